"""The arithmetic of ternary weights: functions on arrays that need jax and nothing else of this project."""

from tclip_jax.ternary.matmul import choose, repack, ternary_matmul
from tclip_jax.ternary.packed import PackedTensor
from tclip_jax.ternary.quantizers import Quantizer, fake_quantize, ternarize
from tclip_jax.ternary.tensor import TernaryTensor

__all__ = [
    "PackedTensor",
    "Quantizer",
    "TernaryTensor",
    "choose",
    "fake_quantize",
    "repack",
    "ternarize",
    "ternary_matmul",
]
