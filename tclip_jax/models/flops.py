"""Floating-point operations of a model by formula, and peak FLOP/s of devices: numerator and denominator of MFU.

XLA's own count is not usable: it counts the body of a scan once. A multiplication and an addition are two operations.
Only matrix products count; all else is below 1 % in a model of useful width.
"""

from __future__ import annotations

from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig

# Dense bfloat16 FLOP/s of a JAX device, by its `device_kind`, from the vendors' data sheets. A chip of TPU v2, v3 or 7x
# is two devices, one of v4 is one (its two cores are fused).
PEAK_FLOPS: dict[str, float] = {
    "TPU v2": 23e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Return the peak dense bfloat16 FLOP/s of a device.

    The longest name in `PEAK_FLOPS` applies that equals the kind, or is followed by a space or a dash ("NVIDIA H100
    80GB HBM3"). MFU refers to bfloat16 for all precisions.

    Args:
      device_kind: `device_kind` of a JAX device.

    Returns:
      FLOP/s, or None for an unknown device, such as a CPU.
    """
    known = [name for name in PEAK_FLOPS if device_kind == name or device_kind.startswith((f"{name} ", f"{name}-"))]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def image_flops(config: CLIPConfig) -> int:
    """Return the number of operations that encode one image: patch embedding, blocks, pooling and projection."""
    vision, patches = config.vision, config.vision.grid[0] * config.vision.grid[1]
    patch = 2 * patches * 3 * vision.patch_size**2 * vision.width
    width = vision.width
    projection = 2 * width * config.embed_dim * vision.projection
    # Keys and values of all tokens; attention of one query, the query, out and the MLP.
    pool = 2 * width * (vision.tokens * 2 * width + 2 * vision.tokens + 2 * width + 2 * int(width * vision.mlp_ratio))
    pool *= vision.pool_type == "map"
    return patch + _tower_flops(vision, vision.tokens) + pool + projection


def text_flops(config: CLIPConfig, length: int | None = None) -> int:
    """Return the number of operations that encode one text: blocks and projection.

    A causal mask saves no operations, because masked products are computed too.

    Args:
      config: the shape of the model.
      length: number of tokens; by default the context length.
    """
    text = config.text
    projection = 2 * text.width * config.embed_dim * (text.proj_type == "linear")
    return _tower_flops(text, length or text.context_length) + projection


def train_flops(
    student: CLIPConfig,
    teacher: CLIPConfig | None = None,
    *,
    remat: bool = False,
    grad_cache: bool = False,
    teacher_passes: int = 1,
) -> int:
    """Return the number of operations of a training step per image-text pair.

    The student counts three times its forward pass, because the backward pass takes twice the forward pass. The
    similarities of the loss, 2 · batch · embed_dim per pair and term, are left out: they are below 0.1
    % of a ViT-B/16 at 32,768 pairs.

    Args:
      student: the shape of the student.
      teacher: the shape of the teacher, or None.
      remat: count the recomputed forward pass of the student, which the hardware executes. By convention it is not part
        of MFU (PaLM, arXiv 2204.02311, appendix B).
      grad_cache: count the further forward pass of the student that microbatches take; not part of MFU either.
      teacher_passes: forward passes of the teacher.
    """
    forward = image_flops(student) + text_flops(student)
    taught = image_flops(teacher) + text_flops(teacher) if teacher else 0
    return student_passes(remat, grad_cache) * forward + teacher_passes * taught


def student_passes(remat: bool, grad_cache: bool) -> int:
    """Return the time of the student's forward and backward passes in forward passes; see `train_flops`."""
    return 3 + remat + grad_cache


def attention_flops(tower: VisionConfig | TextConfig, tokens: int) -> int:
    """Return the operations of attention logits and weighted sums of values in all layers, for one sequence."""
    return tower.layers * 4 * tokens * tokens * tower.width


def _tower_flops(tower: VisionConfig | TextConfig, tokens: int) -> int:
    """For each layer: q, k, v and out, the MLP, and attention."""
    width = tower.width
    dense = 2 * tokens * width * (4 * width + 2 * int(width * tower.mlp_ratio))
    return tower.layers * dense + attention_flops(tower, tokens)
