"""Parameters of the losses alone, beside the model's: dropped after training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tclip_jax.models.config import CLIPConfig
from tclip_jax.training.sections import LossConfig


def init_heads(
    key: jax.Array, student: CLIPConfig, teacher: CLIPConfig | int | None, loss: LossConfig
) -> dict[str, Any]:
    """What the terms of the loss with a weight ask for, and nothing else: weight decay would shrink it.

    Args:
      key: for the projections.
      student: its shape.
      teacher: its shape, its embed_dim where only its embeddings are known, or None for none.
      loss: the terms.

    Returns:
      `image`, `text`: projections of embeddings to the teacher's width, for icl and fd; `icl_scale`: ICL's scale, which
      starts at 2.659; `hidden`: for each tower a projection of hidden states; `sigmoid_bias`: SigLIP's, from −10.
    """
    heads: dict[str, Any] = {}
    if loss.sigmoid:
        heads["sigmoid_bias"] = jnp.float32(-10)
    if teacher is None:
        return heads
    if loss.projected:
        width = teacher if isinstance(teacher, int) else teacher.embed_dim
        for name, each in zip(("image", "text"), jax.random.split(key), strict=True):
            heads[name] = _linear(each, student.embed_dim, width)
    if loss.icl:
        heads["icl_scale"] = jnp.float32(2.659)
    if loss.hidden and not isinstance(teacher, int):
        widths = {
            "image": (student.vision.width, teacher.vision.width),
            "text": (student.text.width, teacher.text.width),
        }
        keys = jax.random.split(jax.random.fold_in(key, 2))
        heads["hidden"] = {
            tower: _linear(each, *widths[tower])
            for tower, each in zip(("image", "text"), keys, strict=True)
            if tower in loss.towers
        }
    return heads


def _linear(key: jax.Array, width: int, to_width: int) -> dict[str, jax.Array]:
    bound = width**-0.5
    kernel = jax.random.uniform(key, (width, to_width), minval=-bound, maxval=bound)
    return {"kernel": kernel, "bias": jnp.zeros(to_width)}
