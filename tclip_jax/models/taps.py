"""Capture of activations inside the towers without changes to the model; only requested activations are kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
from flax import linen as nn

from tclip_jax.models.clip import CLIP

States = dict[str, dict[str, jax.Array]]  # tower -> "hidden" (L, B, T, D) and "qkv" (L, B, T, 3 · D)

_MODULES = {"hidden": "blocks", "qkv": "qkv"}


def apply_with_states(
    model: CLIP,
    params: Any,
    pixels: jax.Array,
    tokens: jax.Array,
    towers: Collection[str],
    kinds: Collection[str],
    rngs: dict[str, jax.Array] | None = None,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], States]:
    """Apply a model and return the states of all layers of the given towers.

    Args:
      model: the model.
      params: its parameters.
      pixels: normalised float pixels (B, H, W, 3).
      tokens: int32 tokens (B, T).
      towers: any of "image" and "text".
      kinds: any of "hidden", the residual stream after each block, and "qkv", the fused queries, keys and values.
      rngs: PRNG keys, as `flax.linen.Module.apply` takes them.

    Returns:
      The outputs of the model, and for each tower and kind the states of its layers: "hidden" (L, B, T, D) and "qkv"
      (L, B, T, 3 · D).
    """
    wanted = {_MODULES[kind]: kind for kind in kinds}
    with nn.intercept_methods(functools.partial(_record, wanted, tuple(towers))):
        outputs, recorded = model.apply({"params": params}, pixels, tokens, mutable=["taps"], rngs=rngs)
    states: States = {}
    for tower, activations in recorded.get("taps", {}).items():
        blocks = activations["blocks"]
        states[tower] = {"hidden": blocks["hidden"]} if "hidden" in kinds else {}
        states[tower] |= {"qkv": blocks["attention"]["qkv"]["qkv"]} if "qkv" in kinds else {}
    return outputs, states


def _record(
    wanted: dict[str, str],
    towers: tuple[str, ...],
    next_fun: Callable[..., Any],
    args: Any,
    kwargs: Any,
    context: nn.module.InterceptorContext,
) -> Any:
    module, result = context.module, next_fun(*args, **kwargs)
    name = module.name or ""
    if context.method_name == "__call__" and name in wanted and module.path[0] in towers:
        value = result[0] if name == "blocks" else result.reshape(*result.shape[:-2], -1)
        tap(module, wanted[name], value)
    return result


def tap(module: nn.Module, name: str, value: jax.Array) -> None:
    """Record an activation in the collection "taps" at the path of its module."""
    module.sow("taps", name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)
