"""Self-attention: its definition in jnp, and the choice of a fused implementation by the kind of device."""

from __future__ import annotations

import functools
import logging
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from tclip_jax.models import attention_tpu
from tclip_jax.parallel.mesh import BATCH_AXES, constrain_batch, mesh_in_force
from tclip_jax.ternary.tensor import traced_device

# "mosaic_tpu" is `attention_tpu`; "cudnn" that of jax.nn.dot_product_attention.
IMPLEMENTATIONS = ("reference", "mosaic_tpu", "cudnn")
_FUSED = {"tpu": "mosaic_tpu", "gpu": "cudnn"}  # the implementation besides the reference, by platform

_logger = logging.getLogger(__name__)


def attend(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, causal: bool) -> jax.Array:
    """Compute the attention softmax(q · kᵀ / √K) · v of each head, with the softmax in float32.

    It equals jax.nn.dot_product_attention. Transposing heads before tokens first makes XLA twice as fast on CPUs.

    Args:
      q_BTHK: queries (B, T, H, K).
      k_BTHK: keys (B, S, H, K); S may differ from T.
      v_BTHK: values (B, S, H, K).
      causal: whether a token attends only to itself and earlier tokens.

    Returns:
      (B, T, H, K).
    """
    q_BHTK, k_BHSK, v_BHSK = (x.transpose(0, 2, 1, 3) for x in (q_BTHK, k_BTHK, v_BTHK))
    logits_BHTS = jnp.einsum("BHTK,BHSK->BHTS", q_BHTK, k_BHSK, preferred_element_type=jnp.float32)
    logits_BHTS *= q_BTHK.shape[-1] ** -0.5
    if causal:
        logits_BHTS = jnp.where(jnp.tri(logits_BHTS.shape[-1], dtype=bool), logits_BHTS, -jnp.inf)
    weights_BHTS = jax.nn.softmax(logits_BHTS, axis=-1).astype(v_BTHK.dtype)
    return jnp.einsum("BHTS,BHSK->BHTK", weights_BHTS, v_BHSK).transpose(0, 2, 1, 3)


@jax.named_scope("attend")
def self_attention(qkv_BT3D: jax.Array, heads: int, causal: bool, implementation: str = "auto") -> jax.Array:
    """Compute self-attention from the fused projection of queries, keys and values.

    Over a mesh, rows stay sharded over `data` and `fsdp`, and heads over `tensor`.

    Args:
      qkv_BT3D: queries, keys and values (B, T, 3, D).
      heads: number of heads.
      causal: whether a token attends only to itself and earlier tokens.
      implementation: "auto" chooses by the kind of device and logs the choice; otherwise one of `IMPLEMENTATIONS`.

    Returns:
      (B, T, D).

    Raises:
      ValueError: the implementation cannot take these shapes, or cannot run on this device; the message has the reason.
    """
    batch, length, _, width = qkv_BT3D.shape
    name = choose((batch, length, heads, width // heads), qkv_BT3D.dtype, implementation)
    if name == "mosaic_tpu":
        mixed_BTD = _over_mesh(qkv_BT3D, width // heads, causal)
        return constrain_batch(mixed_BTD, None, "tensor")
    q_BTHK, k_BTHK, v_BTHK = (qkv_BT3D[:, :, i].reshape(batch, length, heads, width // heads) for i in range(3))
    mixed_BTHK = (_cudnn if name == "cudnn" else attend)(q_BTHK, k_BTHK, v_BTHK, causal)
    return constrain_batch(mixed_BTHK, None, "tensor").reshape(batch, length, width)


def choose(shape: tuple[int, int, int, int], dtype: jax.typing.DTypeLike, implementation: str = "auto") -> str:
    """Choose the implementation for queries (B, T, H, K) on the device in force.

    Each choice is logged once, but not on platforms without fused attention, such as CPUs.

    Raises:
      ValueError: as `self_attention`.
    """
    name, reason = explain_choice(shape, dtype, implementation)
    if traced_device()[1] not in _FUSED:
        return name
    _, length, heads, head_width = shape
    _log(traced_device()[0], f"{length} tokens, {heads} heads of {head_width}, {jnp.dtype(dtype).name}", name, reason)
    return name


def explain_choice(
    shape: tuple[int, int, int, int], dtype: jax.typing.DTypeLike, implementation: str = "auto"
) -> tuple[str, str]:
    """Return the implementation that `choose` chooses, and its reason as one clause; logs nothing."""
    platform = traced_device()[1]
    if implementation == "reference":
        return implementation, "forced"
    if implementation == "auto":
        name = _FUSED.get(platform)
        if name is None:
            return "reference", f"no fused attention is for platform {platform}"
        reason = _unsupported(name, shape, dtype)
        return ("reference", f"not {name}: {reason}") if reason else (name, "the first choice on this platform")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"no attention {implementation!r}: there are auto, {', '.join(IMPLEMENTATIONS)}")
    if reason := _unsupported(implementation, shape, dtype):
        _, length, heads, head_width = shape
        raise ValueError(
            f"attention {implementation!r} cannot serve {length} tokens, {heads} heads of {head_width} on"
            f" {traced_device()[0]}: {reason}"
        )
    return implementation, "forced"


def _unsupported(name: str, shape: tuple[int, int, int, int], dtype: jax.typing.DTypeLike) -> str | None:
    """Return None if an implementation can run here, otherwise the reason as one clause."""
    platform, (batch, length, heads, head_width) = traced_device()[1], shape
    if _FUSED.get(platform) != name:
        return f"it does not run on platform {platform}"
    if not isinstance(batch, int):  # of `jax.export`
        return "the size of the batch is open"
    if name == "cudnn":
        if not (kind := traced_device()[0]).startswith("NVIDIA"):
            return f"cuDNN is for NVIDIA's GPUs, not for {kind}"
        capability = getattr(jax.local_devices()[0], "compute_capability", None)
        if capability and float(capability) < 8:
            return f"cuDNN's attention needs compute capability 8.0, {kind} has {capability}"
        return unsupported_by_cudnn(head_width, dtype)
    mesh, abstract = mesh_in_force(), jax.sharding.get_abstract_mesh()
    if mesh is None:
        if not abstract.empty and abstract.size > 1 and AxisType.Auto in abstract.axis_types:
            return f"the mesh has the axes {', '.join(abstract.axis_names)}"
        return attention_tpu.unsupported(length, heads, head_width, dtype)
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch % devices:
        return f"{batch} rows are not divisible by {devices} devices"
    return attention_tpu.unsupported(length, heads // mesh.shape["tensor"], head_width, dtype)


def unsupported_by_cudnn(head_width: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Return None if cuDNN can take heads of `head_width` channels in `dtype`, otherwise the reason as one clause."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"queries are bfloat16 or float16, not {jnp.dtype(dtype).name}"
    if head_width % 8 or head_width > 128:
        return f"heads have up to 128 channels, a multiple of 8, not {head_width}"
    return None


def _cudnn(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, causal: bool) -> jax.Array:
    """cuDNN's attention. It has a gradient for even numbers of tokens alone; a masked token makes odd ones even."""
    batch, length = q_BTHK.shape[:2]
    padding = [(0, 0), (0, length % 2), (0, 0), (0, 0)]
    lengths = None if length % 2 == 0 or causal else jnp.full(batch, length, jnp.int32)
    mixed_BTHK = jax.nn.dot_product_attention(
        *(jnp.pad(x, padding) for x in (q_BTHK, k_BTHK, v_BTHK)),
        is_causal=causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return mixed_BTHK[:, :length]


def _over_mesh(qkv_BT3D: jax.Array, head_width: int, causal: bool) -> jax.Array:
    """The kernel on each device's rows and heads: XLA cannot partition a kernel."""

    def local(qkv_BT3D: jax.Array) -> jax.Array:
        return attention_tpu.fused_attention(qkv_BT3D.reshape(*qkv_BT3D.shape[:2], -1), head_width, causal)

    mesh = mesh_in_force()
    if mesh is None or AxisType.Auto not in mesh.axis_types:
        return local(qkv_BT3D)
    specs = PartitionSpec(BATCH_AXES, None, None, "tensor"), PartitionSpec(BATCH_AXES, None, "tensor")
    return jax.shard_map(local, in_specs=specs[0], out_specs=specs[1], check_vma=False)(qkv_BT3D)


@functools.cache
def _log(device: str, shape: str, name: str, reason: str) -> None:
    _logger.info("attention (%s, %s): %s (%s)", device, shape, name, reason)
