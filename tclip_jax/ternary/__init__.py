"""Ternary arithmetic as pure functions on arrays: quantize, pack and multiply ternary weights."""

import importlib

from tclip_jax.ternary.matmul import choose, default_activations, repack, ternary_matmul, unpack
from tclip_jax.ternary.packing import gather_rows, pack_rows
from tclip_jax.ternary.quantizers import (
    QUANTIZERS,
    Kind,
    Quantizer,
    find_levels,
    group_means,
    group_size,
    group_totals,
    initial_alpha,
    ternarize,
)
from tclip_jax.ternary.straight_through import fake_quantize
from tclip_jax.ternary.tensor import PackedTensor, TernaryTensor, expand_scale

importlib.import_module("tclip_jax.ternary.kinds")  # registers the kinds of the package

__all__ = [
    "QUANTIZERS",
    "Kind",
    "PackedTensor",
    "Quantizer",
    "TernaryTensor",
    "choose",
    "default_activations",
    "expand_scale",
    "fake_quantize",
    "find_levels",
    "gather_rows",
    "group_means",
    "group_size",
    "group_totals",
    "initial_alpha",
    "pack_rows",
    "repack",
    "ternarize",
    "ternary_matmul",
    "unpack",
]
