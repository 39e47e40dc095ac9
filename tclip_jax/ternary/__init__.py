"""Ternary arithmetic as pure functions on arrays: quantize, pack and multiply ternary weights; and 4 and 8 bits."""

import importlib

from tclip_jax.ternary.matmul import choose, default_activations, repack, ternary_matmul, unpack
from tclip_jax.ternary.packing import gather_rows, pack_rows
from tclip_jax.ternary.quantizers import (
    QUANTIZERS,
    Kind,
    Quantizer,
    find_levels,
    group_maxima,
    group_means,
    group_size,
    group_totals,
    initial_alpha,
    quantize,
    ternarize,
)
from tclip_jax.ternary.straight_through import dead_zone_bias, fake_quantize, soft_quantize
from tclip_jax.ternary.tensor import PackedTensor, QuantizedTensor, TernaryTensor, expand_scale
from tclip_jax.ternary.uniform import UniformTensor

importlib.import_module("tclip_jax.ternary.kinds")  # registers the kinds of the package

__all__ = [
    "QUANTIZERS",
    "Kind",
    "PackedTensor",
    "QuantizedTensor",
    "Quantizer",
    "TernaryTensor",
    "UniformTensor",
    "choose",
    "dead_zone_bias",
    "default_activations",
    "expand_scale",
    "fake_quantize",
    "find_levels",
    "gather_rows",
    "group_maxima",
    "group_means",
    "group_size",
    "group_totals",
    "initial_alpha",
    "pack_rows",
    "quantize",
    "repack",
    "soft_quantize",
    "ternarize",
    "ternary_matmul",
    "unpack",
]
