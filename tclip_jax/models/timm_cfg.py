"""The image towers of SigLIP as open_clip names them: models of timm, such as vit_base_patch16_siglip_224."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from tclip_jax.models.config import VisionConfig


class _Size(NamedTuple):
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0


# timm.models.vision_transformer
_SIZES = {
    "base": _Size(768, 12, 12),
    "large": _Size(1024, 24, 16),
    "so400m": _Size(1152, 27, 16, 3.7362),
    "giantopt": _Size(1536, 40, 16),
}
# Those with GELU by tanh.
_TANH = re.compile(r"base_patch32|large_patch16_siglip(_gap)?_512|so400m_patch16|giantopt")
_NAME = re.compile(r"vit_(?P<size>\w+?)_patch(?P<patch>\d+)_siglip(?P<gap>_gap)?_(?P<image>\d+)(\.\w+)?")
_EPSILON = 1e-6


def is_timm_siglip(name: Any) -> bool:
    """Whether this is timm's name of an image tower that `from_timm` knows."""
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    return match is not None and match["size"] in _SIZES


def from_timm(vision_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a `vision_cfg` of open_clip with a `timm_model_name` of SigLIP to the fields of `VisionConfig`.

    Raises:
      ValueError: open_clip builds another tower than SigLIP's from it.
    """
    name = vision_cfg["timm_model_name"]
    match = _NAME.fullmatch(name)
    assert match is not None
    size, patch, image = _SIZES[match["size"]], int(match["patch"]), int(match["image"])
    pool = "avg" if match["gap"] else "map"
    stated = vision_cfg.get("image_size", 224)
    if stated not in (image, [image, image], (image, image)):
        raise ValueError(f"vision_cfg.image_size is {stated!r:.60}: {name} takes images of {image}")
    for key, possible in (("timm_pool", (pool, "")), ("timm_proj", ("none", "linear"))):
        if vision_cfg.get(key) not in possible:
            raise ValueError(
                f"vision_cfg.{key} is {vision_cfg.get(key)!r:.60}: it must be one of {', '.join(possible)}"
            )
    if vision_cfg.get("timm_proj_bias"):
        raise ValueError("vision_cfg.timm_proj_bias is true: the projection of images has no bias here")
    return {
        "image_size": image,
        "patch_size": patch,
        "width": size.width,
        "layers": size.layers,
        "head_width": size.width // size.heads,
        "mlp_ratio": size.mlp_ratio,
        "pool_type": pool,
        "no_ln_pre": True,
        "norm_eps": _EPSILON,
        "approximate": "tanh" if _TANH.search(name) else "none",
        "class_token": False,
        "patch_bias": True,
        "projection": vision_cfg["timm_proj"] == "linear",
    }


def to_timm(vision: VisionConfig) -> dict[str, Any] | None:
    """Return the `vision_cfg` from which open_clip builds a tower of SigLIP; None if timm has none of this shape."""
    if vision.class_token:
        return None
    for size, shape in _SIZES.items():
        for gap in ("", "_gap"):
            name = f"vit_{size}_patch{vision.patch_size}_siglip{gap}_{vision.image_size[0]}"
            cfg = {
                "image_size": vision.image_size[0],
                "timm_model_name": name,
                "timm_model_pretrained": False,
                "timm_pool": "avg" if gap else "map",
                "timm_proj": "linear" if vision.projection else "none",
            }
            if shape.width == vision.width and _same(from_timm(cfg), vision):
                return cfg
    return None


def _same(fields: Mapping[str, Any], vision: VisionConfig) -> bool:
    stated = {**fields, "image_size": (fields["image_size"],) * 2}
    return all(getattr(vision, name) == value for name, value in stated.items())
