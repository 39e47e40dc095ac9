"""clip.cpp's names for the parameters of a CLIP: one table, read in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tclip_jax.models.ternary_rules import PATCH_EMBEDDING

_OUTSIDE_BLOCKS = {
    "image/patch_embedding": "v.patch_embd",
    "image/position_embedding": "v.position_embd.weight",
    "image/class_embedding": "v.class_embd",
    "image/ln_pre": "v.pre_ln",
    "image/ln_post": "v.post_ln",
    "image/projection": "visual_projection",
    "text/token_embedding": "t.token_embd",
    "text/position_embedding": "t.position_embd.weight",
    "text/ln_final": "t.post_ln",
    "text/projection": "text_projection",
}
# fc1 widens and fc2 narrows: clip.cpp calls them the other way round.
_INSIDE_BLOCKS = {
    "ln_1": ("ln1",),
    "attention/qkv": ("attn_q", "attn_k", "attn_v"),
    "attention/out": ("attn_out",),
    "ln_2": ("ln2",),
    "mlp/fc1": ("ffn_down",),
    "mlp/fc2": ("ffn_up",),
}
_TOWERS = {"image": "v", "text": "t"}
_SUFFIXES = {"kernel": ".weight", "scale": ".weight", "embedding": ".weight", "bias": ".bias"}


class Entry(NamedTuple):
    """One tensor of the file: `path` in the parameter tree, its layer, and which of `parts` along the outputs."""

    name: str
    path: str
    layer: int | None = None
    part: int = 0
    parts: int = 1

    def view(self, stacked: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What this tensor is of the array at `path`, its outputs first; also of that array's scales."""
        value = stacked if self.layer is None else stacked[self.layer]
        value = np.split(value, self.parts, axis=-1)[self.part]
        if self.path == PATCH_EMBEDDING:
            return value.transpose(3, 2, 0, 1)
        return value.T if self.path.endswith("/kernel") else value


def table(shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
    """The tensors of a model, those of one parameter together; logit_scale is among the metadata."""
    entries = []
    for path, shape in shapes.items():
        stem, _, last = path.rpartition("/")
        tower, inside, layer_name = stem.partition("/blocks/")
        if inside:
            names = _INSIDE_BLOCKS[layer_name]
            entries += [
                Entry(f"{_TOWERS[tower]}.blk.{layer}.{name}{_SUFFIXES[last]}", path, layer, part, len(names))
                for layer in range(shape[0])
                for part, name in enumerate(names)
            ]
        elif path != "logit_scale":
            entries.append(Entry(_OUTSIDE_BLOCKS.get(path) or _OUTSIDE_BLOCKS[stem] + _SUFFIXES[last], path))
    return entries
