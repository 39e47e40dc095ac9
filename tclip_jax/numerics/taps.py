"""Record named activations (taps) of both towers, from the same modules and the same scan as in training.

A tower with L layers has 5 + 3·L taps. In the order of the computation:

| tap | value |
|---|---|
| image/patch_embedding, text/token_embedding | (B, N, D), (B, T, D), without class token and positions |
| image/embedded, text/embedded | the input of the first block (B, T, D) |
| …/blocks/i/attention, …/blocks/i/mlp | the output of each branch of block i, before any LayerScale |
| …/blocks/i | the residual stream after block i |
| image/ln_post, text/ln_final | the pooled and normalised token (B, D); all (B, T, D) if normalised before pooling |
| …/projection, …/embedding | the embedding (B, E), before and after L2 normalisation |
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from tclip_jax.inference.model import Model
from tclip_jax.models.clip import CLIP
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.taps import tap

Taps = dict[str, npt.NDArray[np.float32]]

_BRANCHES = ("attention", "mlp")
_TAPPED = ("patch_embedding", "token_embedding", "blocks", *_BRANCHES, "ln_post", "ln_final", "projection")


def tap_names(config: CLIPConfig) -> tuple[str, ...]:
    """Return the names of a model's taps in the order of the computation."""
    names = []
    for tower, first, layers, last in (
        ("image", "patch_embedding", config.vision.layers, "ln_post"),
        ("text", "token_embedding", config.text.layers, "ln_final"),
    ):
        blocks = [f"blocks/{i}{part}" for i in range(layers) for part in ("/attention", "/mlp", "")]
        names += [f"{tower}/{name}" for name in (first, "embedded", *blocks, last, "projection", "embedding")]
    return tuple(names)


def collect_taps(
    model: Model,
    pixels: npt.NDArray[np.float32],
    tokens: npt.NDArray[np.int32],
    reference: Mapping[str, npt.NDArray[np.float32]] | None = None,
    dtype: jax.typing.DTypeLike = np.float32,
    epsilon: float | None = None,
) -> Taps:
    """Return the activations of a model by tap name, as float32 arrays.

    Args:
      model: a model with latent or packed weights.
      pixels: normalised images (B, H, W, 3) float32.
      tokens: token ids (B, T) int32.
      reference: taps of another model for the same inputs. If given, each tap is computed from the reference's earlier
        taps instead of the model's own, so that an error appears only where it is made.
      dtype: dtype of the computation.
      epsilon: of every LayerNorm, in place of the model's own.
    """
    clip, forced = CLIP(model.config, model.rules, dtype), {} if reference is None else _nest(reference, model.config)
    recorded = flatten_dict(jax.device_get(_apply(clip, model.params, forced, pixels, tokens, epsilon)), sep="/")
    taps: Taps = {}
    for tower in ("image", "text"):
        taps[f"{tower}/embedding"] = recorded.pop(f"embeddings/{tower}")
        taps[f"{tower}/embedded"] = recorded.pop(f"{tower}/blocks/input")[0]
    for path, value in recorded.items():
        name = path.removesuffix("/output")
        if "/blocks" in name:
            taps |= {name.replace("/blocks", f"/blocks/{i}"): layer for i, layer in enumerate(value)}
        else:
            taps[name] = value
    return {name: taps[name].astype(np.float32) for name in tap_names(model.config)}


@functools.partial(jax.jit, static_argnums=0)
def _apply(
    clip: CLIP, params: Any, reference: Any, pixels: jax.Array, tokens: jax.Array, epsilon: jax.Array | float | None
) -> dict[str, Any]:
    with nn.intercept_methods(_record), nn.intercept_methods(functools.partial(_normalize, epsilon)):
        variables = {"params": params, "reference": reference}
        (image, text, _), recorded = clip.apply(variables, pixels, tokens, mutable=["taps"])
    return recorded["taps"] | {"embeddings": {"image": image, "text": text}}


def _record(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    module = context.module
    if context.method_name != "__call__" or module.name not in _TAPPED:
        return next_fun(*args, **kwargs)
    if module.name != "blocks":
        return _exchange(module, "output", next_fun(*args, **kwargs))
    x_BTD, *rest = args
    x_BTD, scan_output = next_fun(_exchange(module, "input", x_BTD), *rest, **kwargs)
    return _exchange(module, "output", x_BTD), scan_output


def _normalize(
    epsilon: jax.Array | float | None,
    next_fun: Callable[..., Any],
    args: Any,
    kwargs: Any,
    context: nn.module.InterceptorContext,
) -> Any:
    """Compute a LayerNorm with another epsilon, which may be traced; None leaves it unchanged."""
    module = context.module
    if epsilon is None or context.method_name != "__call__" or not isinstance(module, nn.LayerNorm):
        return next_fun(*args, **kwargs)
    (x,) = args
    x = x.astype(np.float32)
    centred = x - x.mean(axis=-1, keepdims=True)
    normalized = centred * jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
    return normalized * module.get_variable("params", "scale") + module.get_variable("params", "bias")


def _exchange(module: nn.Module, name: str, value: jax.Array) -> jax.Array:
    """Record the model's own value, and return the reference's value if there is one."""
    tap(module, name, value)
    return module.get_variable("reference", name, value).astype(value.dtype)


def _nest(reference: Mapping[str, npt.NDArray[np.float32]], config: CLIPConfig) -> dict[str, Any]:
    """Return taps as the variables that `_exchange` reads, with layers stacked."""
    nested: dict[str, Any] = {}
    for tower, layers, names in (
        ("image", config.vision.layers, ("patch_embedding", "ln_post", "projection")),
        ("text", config.text.layers, ("token_embedding", "ln_final", "projection")),
    ):
        nested |= {f"{tower}/{name}/output": reference[f"{tower}/{name}"] for name in names}
        blocks = [reference[f"{tower}/blocks/{i}"] for i in range(layers)]
        nested[f"{tower}/blocks/output"] = np.stack(blocks)
        nested[f"{tower}/blocks/input"] = np.stack([reference[f"{tower}/embedded"], *blocks[:-1]])
        for branch in _BRANCHES:
            values = [reference[f"{tower}/blocks/{i}/{branch}"] for i in range(layers)]
            nested[f"{tower}/blocks/{branch}/output"] = np.stack(values)
    return unflatten_dict(nested, sep="/")
