"""The packed tensor: a ternary weight in the bytes that one implementation of the product reads."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax

Activations = Literal["A16", "A8"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("data", "scale"),
    meta_fields=("shape", "group", "layout", "activations"),
)
@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """A ternary weight repacked for one implementation; only that one knows the order of `data` and `scale`.

    Attributes:
      data: bytes or words; may have a leading layer axis, which nn.scan slices.
      scale: float32 or bfloat16.
      shape: (K, N) of one layer's weight; (V, W) of an embedding table.
      group: consecutive weights along K (W of a table) that share a scale.
      layout: name of the implementation; "rows" of an embedding table.
      activations: how it is multiplied where the caller does not say.
    """

    data: jax.Array
    scale: jax.Array
    shape: tuple[int, int]
    group: int
    layout: str
    activations: Activations = "A16"
