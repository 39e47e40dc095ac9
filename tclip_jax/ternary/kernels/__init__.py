"""Implementations of the ternary product, one module each, with one interface.

Each module has
  NAME: str
  unsupported(*, device_kind, platform, rows, shape, group, dtype, activations) -> str | None
    None if the implementation can run, otherwise the reason as one clause. It depends on shapes and the kind of device
    alone and runs nothing. `rows` is M, or None if it is not known yet; `shape` is (K, N); `dtype` is that of x.
  slower(*, …, as unsupported) -> str | None
    None if the implementation is at least as fast as a dense product, otherwise the reason. The dispatcher then skips
    the implementation unless the caller forces it.
  pack(w: TernaryTensor) -> PackedTensor
    Requires that `w.axis` is −2; keeps leading layer axes. Takes NumPy or JAX arrays, and returns NumPy or JAX arrays,
    as the implementation needs them.
  unpack(w: PackedTensor) -> jax.Array
    The float32 weights (…, K, N), exactly scale · trit: for gradients and comparisons.
  matmul(x: jax.Array, w: PackedTensor, *, activations) -> jax.Array
    (M, K) and the weight of one layer to (M, N) in the dtype of x, accumulated in float32.
"""

from __future__ import annotations

import importlib
from types import ModuleType

# Candidates of each platform, best first; `reference` runs on all platforms.
PREFERRED = {
    "cpu": ("native_cpu", "xla_int8"),
    "tpu": ("mosaic_tpu_int8", "mosaic_tpu", "xla_int2"),
    "gpu": ("mosaic_gpu",),
}
NAMES = ("reference", *dict.fromkeys(name for names in PREFERRED.values() for name in names))


def kernel(name: str) -> ModuleType:
    """Import and return the module of an implementation.

    Raises:
      ValueError: the name is not in `NAMES`.
    """
    if name not in NAMES:
        raise ValueError(f"no implementation {name!r} of the ternary product: there are {', '.join(NAMES)}")
    return importlib.import_module(f"tclip_jax.ternary.kernels.{name}")
