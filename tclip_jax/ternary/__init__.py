"""Ternary arithmetic as pure functions on arrays: quantize, pack and multiply ternary weights."""

from tclip_jax.ternary.matmul import choose, repack, ternary_matmul, unpack
from tclip_jax.ternary.packing import gather_rows, pack_rows
from tclip_jax.ternary.quantizers import Quantizer, initial_alpha, ternarize
from tclip_jax.ternary.straight_through import fake_quantize
from tclip_jax.ternary.tensor import PackedTensor, TernaryTensor

__all__ = [
    "PackedTensor",
    "Quantizer",
    "TernaryTensor",
    "choose",
    "fake_quantize",
    "gather_rows",
    "initial_alpha",
    "pack_rows",
    "repack",
    "ternarize",
    "ternary_matmul",
    "unpack",
]
