"""The arithmetic of ternary weights: functions on arrays that need jax and nothing else of this project."""

from tclip_jax.ternary.matmul import ternary_matmul
from tclip_jax.ternary.quantizers import Quantizer, fake_quantize, ternarize
from tclip_jax.ternary.tensor import TernaryTensor

__all__ = ["Quantizer", "TernaryTensor", "fake_quantize", "ternarize", "ternary_matmul"]
