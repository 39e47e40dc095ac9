"""Initialisation of a student from a larger model: TinyCLIP's manual inheritance (arXiv 2309.12314, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flax.traverse_util import flatten_dict, unflatten_dict

from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import is_learned_scale
from tclip_jax.ternary import QuantizedTensor

Array = npt.NDArray[np.float32]


def chosen_layers(depth: int, student_depth: int) -> list[int]:
    """Select `student_depth` of `depth` layers, evenly spaced from the first to the last.

    A single layer is the first one.
    """
    return [round(i * (depth - 1) / max(student_depth - 1, 1)) for i in range(student_depth)]


def inherit_params(params: Mapping[str, Any], config: CLIPConfig, student: CLIPConfig) -> dict[str, Any]:
    """Initialise a student with a part of the weights of a larger model.

    Layers are selected evenly spaced, the leading heads are taken, and every other axis is cut to its leading channels.
    Ternary weights are dequantized.

    Args:
      params: parameters of the larger model.
      config: shape of the larger model.
      student: shape of the student.

    Returns:
      Float32 NumPy parameters of the student.

    Raises:
      ValueError: the student is larger in some dimension, has a parameter that the larger model lacks, or differs in
        patch size, grid of patches or vocabulary.
    """
    for name, ours, theirs in (
        ("patch size", student.vision.patch_size, config.vision.patch_size),
        ("grid of patches", student.vision.grid, config.vision.grid),
        ("vocabulary", student.text.vocab_size, config.text.vocab_size),
    ):
        if ours != theirs:
            raise ValueError(
                f"the student's {name} is {ours}: to inherit weights it must be the other model's, {theirs}"
            )
    leaves = {path: leaf for path, leaf in flatten_dict(params, sep="/").items() if not is_learned_scale(path)}
    shapes = {path: leaf.shape for path, leaf in flatten_dict(param_shapes(student), sep="/").items()}
    if missing := shapes.keys() - leaves.keys():
        raise ValueError(f"the student has {sorted(missing)[0]}, which the other model lacks: nothing to inherit")
    sizes = {
        "image": (config.vision.layers, config.vision.heads, student.vision.layers, student.vision.heads),
        "text": (config.text.layers, config.text.heads, student.text.layers, student.text.heads),
    }
    full = {path: leaf.shape for path, leaf in flatten_dict(param_shapes(config), sep="/").items()}
    inherited = {}
    for path, shape in shapes.items():
        leaf = leaves[path]
        whole = np.asarray(leaf.dequantize() if isinstance(leaf, QuantizedTensor) else leaf, np.float32)
        whole = whole.reshape(full[path])
        if "/blocks/" in path:
            depth, heads, student_depth, student_heads = sizes[path.split("/")[0]]
            if student_depth > depth or student_heads > heads:
                raise ValueError(
                    f"{path}: the student has {student_depth} layers of {student_heads} heads, the other model {depth}"
                    f" of {heads}: only a smaller student can inherit"
                )
            whole = whole[chosen_layers(depth, student_depth)]
            if "/attention/" in path:
                inherited[path] = _attention(path, whole, shape, heads, student_heads)
                continue
        inherited[path] = _leading(path, whole, shape)
    return unflatten_dict(inherited, sep="/")


def _attention(path: str, whole: Array, shape: tuple[int, ...], heads: int, student_heads: int) -> Array:
    """Cut queries, keys and values separately and by heads: (L, …, 3, heads, head width) or (L, heads, …, W)."""
    if path.endswith(("qkv/kernel", "qkv/bias")):
        split = whole.reshape(*whole.shape[:-1], 3, heads, -1)
        return _leading(path, split, (*shape[:-1], 3, student_heads, shape[-1] // (3 * student_heads))).reshape(shape)
    if path.endswith("out/kernel"):
        split = whole.reshape(len(whole), heads, -1, whole.shape[-1])
        return _leading(path, split, (shape[0], student_heads, shape[1] // student_heads, shape[2])).reshape(shape)
    return _leading(path, whole, shape)


def _leading(path: str, whole: Array, shape: tuple[int, ...]) -> Array:
    if any(size > limit for size, limit in zip(shape, whole.shape, strict=True)):
        raise ValueError(f"{path}: the student's {shape} is not within {whole.shape}: only a smaller one can inherit")
    return np.array(whole[tuple(slice(0, size) for size in shape)])
