"""Floating-point operations of a model by formula, and what devices can do at most: the two halves of MFU.

XLA's own count cannot serve: it takes the body of a scan once. A multiplication and an addition are two operations, and
only products of matrices count; the rest is below a per cent of a model of a useful width.
"""

from __future__ import annotations

from tclip_jax.models.config import CLIPConfig

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
    """The most dense bfloat16 FLOP/s of a device; None where it is not known, as of a CPU.

    The longest name of `PEAK_FLOPS` decides that the kind is, or goes on from after a blank or a dash ("NVIDIA H100
    80GB HBM3"). Other precisions are measured against bfloat16 too.
    """
    known = [name for name in PEAK_FLOPS if device_kind == name or device_kind.startswith((f"{name} ", f"{name}-"))]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def image_flops(config: CLIPConfig) -> int:
    """Of encoding an image: patch embedding, blocks, projection."""
    vision, patches = config.vision, config.vision.grid[0] * config.vision.grid[1]
    patch = 2 * patches * 3 * vision.patch_size**2 * vision.width
    return patch + _tower_flops(vision.layers, patches + 1, vision.width, vision.mlp_ratio, config.embed_dim)


def text_flops(config: CLIPConfig, length: int | None = None) -> int:
    """Of encoding a text of `length` tokens, by default the context length: blocks and projection.

    A causal mask spares nothing: what it hides is computed too.
    """
    text = config.text
    return _tower_flops(text.layers, length or text.context_length, text.width, text.mlp_ratio, config.embed_dim)


def train_flops(student: CLIPConfig, teacher: CLIPConfig | None = None, *, remat: bool = False) -> int:
    """Of a training step, per pair of image and text: three times the student's forward, once the teacher's.

    The backward pass costs twice the forward. With `remat` the forward counts once more: what the hardware does, but no
    part of MFU by convention (PaLM, arXiv 2204.02311, appendix B). The similarities of the loss, 2 · batch · embed_dim
    per pair and term, are left out: below 0.1 % of a ViT-B/16 at 32,768 pairs.
    """
    forward = image_flops(student) + text_flops(student)
    return (3 + remat) * forward + (image_flops(teacher) + text_flops(teacher) if teacher else 0)


def _tower_flops(layers: int, tokens: int, width: int, mlp_ratio: float, embed_dim: int) -> int:
    """Per layer q, k, v and out, the MLP, logits and their mix; then the projection of one token."""
    dense = 2 * tokens * width * (4 * width + 2 * int(width * mlp_ratio))
    return layers * (dense + 4 * tokens * tokens * width) + 2 * width * embed_dim
