"""Plug-ins for tests, and registries that forget them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from tclip_jax import plugins, registry
from tclip_jax.runs.checks import REGISTRIES
from tclip_jax.ternary import Quantizer, expand_scale, group_means, group_size


@contextlib.contextmanager
def own_registries() -> Iterator[None]:
    """Within it plug-ins can be registered; afterwards the registries are as before."""
    kept = {name: (dict(each._entries), dict(each._files)) for name, each in REGISTRIES.items()}
    files = set(registry._files)
    try:
        yield
    finally:
        for name, (entries, origins) in kept.items():
            REGISTRIES[name]._entries, REGISTRIES[name]._files = entries, origins
        registry._files.clear()
        registry._files.update(files)


def clipped(g: Any, w: Any, scale: Any, threshold: Any, quantizer: Quantizer, axis: int, size: int) -> jax.Array:
    return jnp.where(jnp.abs(w) <= quantizer.option("clip") * scale, g, 0)


def register_stochastic(**changes: Any) -> None:
    """The quantizer of docs/extending.md: w becomes ±s with the probability |w| / s."""

    @plugins.quantizer("stochastic", **{"gradient": clipped, "random": True, "options": {"clip": 1.5}, **changes})
    def stochastic(w: jax.Array, quantizer: Quantizer, axis: int, key: jax.Array | None) -> Any:
        scale = group_means(jnp.abs(w).astype(jnp.float32), quantizer, axis, 2.0)
        if key is None:
            return scale, None
        per_weight = expand_scale(scale, group_size(w.shape, quantizer, axis), w.shape[axis], axis)
        return scale, per_weight * jax.random.uniform(key, w.shape)
