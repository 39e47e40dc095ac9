"""The device that a function is traced for."""

from __future__ import annotations

import jax


def traced_device() -> tuple[str, str]:
    """Kind and platform of the device that a function traced now will run on: the mesh's, else jax's default."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is None:
        default = jax.config.values["jax_default_device"]
        described = default if isinstance(default, jax.Device) else jax.devices(default)[0]
    return described.device_kind, described.platform
