"""Implementations of the ternary product, one module each, under one interface.

Each module has
  NAME: str
  unsupported(*, device_kind, platform, rows, shape, group, dtype, activations) -> str | None
    None if it can run, else why not in one clause; decided from shapes and the kind of device alone, never by trying.
    `rows` is M, None when not known yet; `shape` is (K, N); `dtype` is that of x.
  slower(*, …the same) -> str | None
    None if it is at least as fast as a dense product there, else why not: the dispatcher then passes it over, but it
    can still be forced.
  pack(w: TernaryTensor) -> PackedTensor
    `w.axis` is −2; leading layer axes are kept. NumPy or JAX arrays in, the same or JAX arrays out.
  unpack(w: PackedTensor) -> jax.Array
    The float32 weights (…, K, N), scale · trit exactly: for gradients and comparisons.
  matmul(x: jax.Array, w: PackedTensor, *, activations) -> jax.Array
    (M, K) with one layer's weight gives (M, N) in the dtype of x, accumulated in float32.
"""

from __future__ import annotations

import importlib
from types import ModuleType

# What is tried on a platform, best first; `reference` runs everywhere.
PREFERRED = {
    "cpu": ("native_cpu", "xla_int8"),
    "tpu": ("mosaic_tpu_int8", "mosaic_tpu", "xla_int2"),
    "gpu": ("mosaic_gpu",),
}
NAMES = ("reference", *dict.fromkeys(name for names in PREFERRED.values() for name in names))


def kernel(name: str) -> ModuleType:
    """The module of that name, imported when it is first asked for.

    Raises:
      ValueError: there is none.
    """
    if name not in NAMES:
        raise ValueError(f"no implementation {name!r} of the ternary product: there are {', '.join(NAMES)}")
    return importlib.import_module(f"tclip_jax.ternary.kernels.{name}")
