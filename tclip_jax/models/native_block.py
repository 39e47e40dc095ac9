"""A transformer block with packed weights in five native calls, for inference on CPUs.

The calls fuse LayerNorm, rounding, bias, activation and residual with the products, and never store the scores of
attention. The modules of `transformer.py` define the same block, and serve everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType

from tclip_jax.models.config import Activation
from tclip_jax.models.layers import activate
from tclip_jax.ternary.kernels import native_cpu
from tclip_jax.ternary.tensor import PackedTensor, QuantizedTensor, TernaryTensor, traced_device

_LAYERS = (("attention", "qkv"), ("attention", "out"), ("mlp", "fc1"), ("mlp", "fc2"))


def is_native(params: Mapping[str, Any]) -> bool:
    """Whether a block can run natively: on a CPU, without a mesh, its ternary weights packed for the native kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1 or all(kind == AxisType.Manual for kind in mesh.axis_types)
    kernels = [params[part][name]["kernel"] for part, name in _LAYERS]
    packed = [w for w in kernels if isinstance(w, PackedTensor)]
    fits = all(w.layout == native_cpu.NAME for w in packed) and not any(isinstance(w, TernaryTensor) for w in kernels)
    return alone and bool(packed) and fits and traced_device()[1] == "cpu"


def native_block(
    params: Mapping[str, Any], x_BTD: jax.Array, *, heads: int, causal: bool, activation: Activation, epsilon: float
) -> jax.Array:
    """Compute a block without LayerScale: x + attention(ln_1(x)), then x + mlp(ln_2(x)).

    Args:
      params: the parameters of `Block`, for which `is_native` holds.
      x_BTD: the residual stream, float32 (B, T, D).
      heads: number of attention heads.
      causal: as in `Block`.
      activation: as in `Block`.
      epsilon: what LayerNorm adds to the variance.

    Returns:
      float32 (B, T, D).
    """
    attention, mlp, batch = params["attention"], params["mlp"], x_BTD.shape[:2]
    x = x_BTD.reshape(-1, x_BTD.shape[-1])
    qkv = _dense(x, attention["qkv"], norm=params["ln_1"], epsilon=epsilon)
    kernel = attention["qkv"]["kernel"]
    activations = kernel.activations if isinstance(kernel, PackedTensor) else "A32"
    mixed = native_cpu.attention(qkv.reshape(*batch, -1), heads, causal, activations)
    x = _dense(mixed.reshape(x.shape), attention["out"], residual=x)
    hidden = _dense(x, mlp["fc1"], norm=params["ln_2"], epsilon=epsilon, activation=activation)
    return _dense(hidden, mlp["fc2"], residual=x).reshape(x_BTD.shape)


def _dense(
    x: jax.Array,
    layer: Mapping[str, Any],
    *,
    norm: Mapping[str, jax.Array] | None = None,
    epsilon: float = 0.0,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    w = layer["kernel"]
    if isinstance(w, PackedTensor):
        return native_cpu.dense(
            x,
            w,
            activations=w.activations,
            norm=(norm["scale"], norm["bias"]) if norm else None,
            epsilon=epsilon,
            bias=layer["bias"],
            activation=activation,
            residual=residual,
        )
    if isinstance(w, QuantizedTensor):
        w = w.dequantize()
    if norm:
        x = jax.nn.standardize(x, axis=-1, epsilon=epsilon) * norm["scale"] + norm["bias"]
    y = x @ w + layer["bias"]
    y = y if activation is None else activate(y, activation)
    return y if residual is None else residual + y


def with_transforms(native: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return `native` with the batching (`jax.vmap`) and the gradient of `plain`, which computes the same in jnp."""
    batchable = custom_vmap(native)

    @batchable.def_vmap
    def batched(size: int, is_batched: Any, *operands: Any) -> tuple[jax.Array, bool]:
        axes = jax.tree.map(lambda mapped: 0 if mapped else None, is_batched)
        return jax.vmap(plain, tuple(axes), axis_size=size)(*operands), True

    function = jax.custom_vjp(batchable)
    function.defvjp(
        lambda *operands: (function(*operands), operands),
        lambda operands, gradient: jax.vjp(plain, *operands)[1](gradient),
    )
    return function
