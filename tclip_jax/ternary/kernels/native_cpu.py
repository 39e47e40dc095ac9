"""Ternary product on CPUs in C++, for AVX-512 VNNI, AVX-VNNI, AVX2, NEON or any CPU; selected at run time.

With A8 and A16 activations are rounded to int8 or int16 and multiplied by integer dot instructions. With A32 the
weights are unpacked into the L1 cache piece by piece and multiplied in float32, so the result differs from a dense
float32 product only in the order of its sums. `hatch_build.py` compiles the library at installation.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tclip_jax.ternary.packing import narrow_scale
from tclip_jax.ternary.tensor import Activations, PackedTensor, TernaryTensor, expand_scale

NAME = "native_cpu"
Activation = Literal["gelu", "gelu_tanh", "quick_gelu"] | None
# Where integer products of 16 bits have twice the rate of float32 ones.
FAST_A16 = ("avx512_vnni", "avx_vnni", "avx2")
NOT_BUILT = "the native library was not built when this version of tclip_jax was installed (it needs a C++17 compiler)"
LIBRARY = pathlib.Path(__file__).parents[1] / "native" / "libternary_cpu.so"

_INTERFACE = 4  # as in native/ternary_cpu.cc; raised when a function takes other arguments or values
_TARGETS = {"tclip_ternary_matmul": "TclipTernaryMatmul", "tclip_attention": "TclipAttention"}
_ACTIVATIONS = {"A32": 0, "A16": 1, "A8": 2}
_FUNCTIONS = {None: 0, "gelu": 1, "quick_gelu": 2, "gelu_tanh": 3}
_PANEL, _CHUNK = 32, 16  # columns of a panel, k of a chunk; see native/ternary_cpu.cc
_SHIFTS = np.array(
    [8 * (k % 4) + 2 * (k // 4) for k in range(_CHUNK)], np.uint32
)  # bits below each k of a chunk in its word


def unsupported(*, platform: str, dtype: Any, **_: Any) -> str | None:
    """Return why the kernel cannot run: no CPU, no compiled library, or activations other than float32 or bfloat16."""
    if platform != "cpu":
        return "it runs on CPUs only"
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"activations are {jnp.dtype(dtype).name}: it takes float32 and bfloat16"
    if not instruction_sets():
        return NOT_BUILT
    return None


def slower(**_: Any) -> str | None:
    """None: it is faster than dense float32 at every measured shape (docs/performance.md)."""
    return None


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Instruction sets of the kernel, best first, "" for one that this CPU lacks; empty without its library."""
    if not LIBRARY.exists():
        return ()
    library = ctypes.cdll.LoadLibrary(str(LIBRARY))
    # An editable installation may have the library of an earlier checkout, whose functions take other arguments.
    if not hasattr(library, f"TclipInterface{_INTERFACE}"):
        return ()
    for target, symbol in _TARGETS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    library.TclipInstructions.restype = ctypes.c_char_p
    library.TclipInstructions.argtypes = [ctypes.c_int64]
    names: list[str] = []
    while (name := library.TclipInstructions(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


def best_instructions() -> str:
    """The instruction set that products use; "" without the library."""
    return next(filter(None, instruction_sets()), "")


def pack(w: TernaryTensor) -> PackedTensor:
    """Pack 2 bits per weight: data uint32 (…, panels, chunks, 32) and scales (…, panels, groups, 32).

    Scales are bfloat16 if that is exact, otherwise float32.
    """
    *layers, length, columns = w.shape
    groups, wide = -(-length // w.group), [(0, 0)] * len(layers)
    rows = _padded_rows(length, w.group)
    codes = np.asarray(w.trits, np.int8).view(np.uint8) + np.uint8(1)
    if len(rows) != length:
        # Groups are padded to whole chunks with code 1, a zero trit, which the added last row holds.
        codes = np.pad(codes, [*wide, (0, 1), (0, 0)], constant_values=1)[..., rows, :]
    codes = np.pad(codes, [*wide, (0, 0), (0, -columns % _PANEL)], constant_values=1)
    chunks = codes.reshape(*layers, len(rows) // _CHUNK, _CHUNK, -1, _PANEL)
    words = np.zeros((*layers, chunks.shape[-4], chunks.shape[-2], _PANEL), np.uint32)
    for k, shift in enumerate(_SHIFTS):
        words |= chunks[..., k, :, :].astype(np.uint32) << shift
    scale = np.broadcast_to(np.asarray(w.scale, np.float32), (*layers, groups, columns))
    scale = np.pad(scale, [*wide, (0, 0), (0, -columns % _PANEL)]).reshape(*layers, groups, -1, _PANEL)
    data: Any = np.ascontiguousarray(np.moveaxis(words, -2, -3))
    level: Any = np.ascontiguousarray(np.moveaxis(narrow_scale(scale), -2, -3))
    return PackedTensor(data, level, (length, columns), w.group, NAME)


def unpack(w: PackedTensor) -> jax.Array:
    """The float32 weights (…, K, N)."""
    length, columns = w.layer_shape
    rows = _padded_rows(length, w.group)
    *layers, panels, chunks, _ = w.data.shape
    codes = jnp.moveaxis(w.data, -3, -2).reshape(*layers, chunks, 1, panels * _PANEL) >> _SHIFTS[:, None] & 3
    places = np.flatnonzero(rows < length)
    trits = codes.reshape(*layers, chunks * _CHUNK, -1)[..., places, :columns].astype(jnp.float32) - 1
    scale = jnp.moveaxis(w.scale, -3, -2).reshape(*layers, -1, panels * _PANEL)[..., :columns].astype(jnp.float32)
    return trits * expand_scale(scale, w.group, length, -2)


def _padded_rows(length: int, group: int) -> np.ndarray:
    """The source row of each packed k, or `length` for padding."""
    starts = range(0, length, group)
    members = [min(group, length - start) for start in starts]
    return np.concatenate(
        [
            np.pad(np.arange(start, start + own), (0, -own % _CHUNK), constant_values=length)
            for start, own in zip(starts, members, strict=True)
        ]
    )


def matmul(x: jax.Array, w: PackedTensor, *, activations: Activations, instructions: str | None = None) -> jax.Array:
    """Multiply: x · ŵ. `instructions` forces one of `instruction_sets()`; by default the first that this CPU has."""
    return dense(x, w, activations=activations, instructions=instructions)


def dense(
    x: jax.Array,
    w: PackedTensor,
    *,
    activations: Activations,
    norm: tuple[jax.Array, jax.Array] | None = None,
    epsilon: float = 0.0,
    bias: jax.Array | None = None,
    activation: Activation = None,
    residual: jax.Array | None = None,
    instructions: str | None = None,
) -> jax.Array:
    """Compute residual + activation(layer_norm(x) · ŵ + bias) in one pass over memory.

    Args:
      x: float32 (M, K); bfloat16 if there is nothing but the product.
      w: the packed weight (K, N) of one layer.
      activations: as in `ternary_matmul`.
      norm: gain and bias of a LayerNorm of `x`, float32 (K,) each.
      epsilon: of the LayerNorm.
      bias: float32 (N,).
      activation: "gelu" (erf), "gelu_tanh", "quick_gelu" or None.
      residual: float32 (M, N).
      instructions: one of `instruction_sets()`; by default the first that this CPU has.

    Returns:
      (M, N) in the dtype of `x`.
    """
    gain, shift = norm or (None, None)
    call = jax.ffi.ffi_call("tclip_ternary_matmul", jax.ShapeDtypeStruct((x.shape[0], w.layer_shape[1]), x.dtype))
    optional = (jnp.zeros(0) if each is None else each for each in (gain, shift, bias, residual))
    return call(
        x,
        w.data,
        w.scale,
        *optional,
        group=w.group,
        activations=np.int64(_ACTIVATIONS[activations]),
        activation=np.int64(_FUNCTIONS[activation]),
        epsilon=np.float32(epsilon),
        instructions=_index(instructions),
    )


def attention(
    qkv: jax.Array, heads: int, causal: bool, activations: Activations = "A32", instructions: str | None = None
) -> jax.Array:
    """Compute softmax attention, whose scores are never stored: softmax in float32, products as `activations` says.

    Args:
      qkv: queries, keys and values side by side, float32 (B, T, 3 · D).
      heads: number of heads, which divides D.
      causal: whether a token attends only to itself and earlier tokens.
      activations: "A8" multiplies integers of 12 to 16 bits, to about 2⁻¹² of the largest value; the others multiply
        in float32.
      instructions: as in `dense`.

    Returns:
      float32 (B, T, D).
    """
    batch, length, width = qkv.shape
    call = jax.ffi.ffi_call("tclip_attention", jax.ShapeDtypeStruct((batch, length, width // 3), qkv.dtype))
    return call(
        qkv,
        heads=np.int64(heads),
        causal=causal,
        activations=np.int64(_ACTIVATIONS[activations]),
        instructions=_index(instructions),
    )


def _index(instructions: str | None) -> np.int64:
    return np.int64(instruction_sets().index(instructions or best_instructions()))
