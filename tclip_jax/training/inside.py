"""The terms of the loss that look inside the towers, and what of a batch they compare."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tclip_jax.losses.features import hidden_matching, relation_matching
from tclip_jax.models.states import States
from tclip_jax.training.sections import LossConfig

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def same_depth(layer: int, depth: int, teacher_depth: int) -> int:
    """The teacher's layer at the relative depth of a student's layer; the last of one is the last of the other."""
    return -(-(layer % depth + 1) * teacher_depth // depth) - 1


def valid_tokens(batch: Batch) -> dict[str, jax.Array]:
    """Of each tower, which tokens count: bool (B, T) of texts, (B, 1) of images, whose tokens all do or none."""
    tokens, real = batch["tokens"], (batch["weight"] > 0)[:, None]
    # What stands after the end of a text has no meaning.
    return {"image": real, "text": real & (jnp.arange(tokens.shape[1]) <= tokens.argmax(axis=-1, keepdims=True))}


def compare_states(
    heads: Any, batch: Batch, student: States, teacher: States, loss: LossConfig, whole: Batch
) -> Metrics:
    """Hidden states and relations, each the mean over layers and towers (and over queries, keys and values).

    `batch` may be some rows of `whole`, of which `tokens` and `weight` are read: the results of its parts add up.
    """
    found: dict[str, list[jax.Array]] = {name: [] for name in ("hidden", "relations") if getattr(loss, name)}
    for tower in student:
        ours, theirs = student[tower], teacher[tower]
        valid, all_valid = valid_tokens(batch)[tower], valid_tokens(whole)[tower]
        part = jnp.sum(valid) / jnp.maximum(jnp.sum(all_valid), 1)
        depth, teacher_depth = (len(next(iter(states.values()))) for states in (ours, theirs))
        for i, j in ((layer, same_depth(layer, depth, teacher_depth)) for layer in loss.layers):
            if loss.hidden:
                x, y = ours["hidden"][i], theirs["hidden"][j]
                projected = x.astype(jnp.float32) @ heads["hidden"][tower]["kernel"] + heads["hidden"][tower]["bias"]
                of = jnp.broadcast_to(valid, x.shape[:2])
                found["hidden"].append(part * hidden_matching(projected, y, loss.hidden_kind, of))
            if loss.relations:
                x, y = ours["qkv"][i], theirs["qkv"][j]
                of = jnp.broadcast_to(valid, x.shape[:2])
                found["relations"] += [
                    part * relation_matching(a, b, loss.relation_heads, of)
                    for a, b in zip(jnp.split(x, 3, axis=-1), jnp.split(y, 3, axis=-1), strict=True)
                ]
    return {name: sum(values, jnp.float32(0)) / len(values) for name, values in found.items()}
