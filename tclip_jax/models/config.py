"""The shape of a CLIP model, in open_clip's own terms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from tclip_jax.schema import check_keys, from_mapping


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision transformer (open_clip's `vision_cfg`); `image_size` is (height, width) in pixels."""

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    head_width: int = 64
    mlp_ratio: float = 4.0
    ls_init_value: float | None = None
    pool_type: Literal["tok", "avg"] = "tok"
    no_ln_pre: bool = False
    final_ln_after_pool: bool = False

    def __post_init__(self) -> None:
        size = self.image_size
        object.__setattr__(self, "image_size", (size, size) if isinstance(size, int) else tuple(size))
        _check_positive(self, "vision_cfg", "patch_size", "width", "head_width", "layers")
        for side in self.image_size:
            if not isinstance(side, int) or side < 1 or side % self.patch_size:
                raise ValueError(f"image size {side} is not divisible by patch size {self.patch_size}")
        if self.width % self.head_width:
            raise ValueError(f"vision width {self.width} is not divisible by head width {self.head_width}")

    @property
    def heads(self) -> int:
        return self.width // self.head_width

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in height and width."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text transformer (open_clip's `text_cfg`)."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    ls_init_value: float | None = None
    pool_type: Literal["argmax", "last"] = "argmax"
    no_causal_mask: bool = False

    def __post_init__(self) -> None:
        _check_positive(self, "text_cfg", "context_length", "vocab_size", "width", "heads", "layers")
        if self.width % self.heads:
            raise ValueError(f"text width {self.width} is not divisible by {self.heads} heads")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both towers, the width of the shared embedding, and the activation: GELU (erf), or x · sigmoid(1.702 x)."""

    embed_dim: int
    vision: VisionConfig
    text: TextConfig
    quick_gelu: bool = False

    @classmethod
    def from_open_clip(cls, model_cfg: Mapping[str, Any]) -> CLIPConfig:
        """From a `model_cfg` of open_clip.

        Raises:
          ValueError: a key that this model does not have, naming it and the nearest that it has.
        """
        check_keys(model_cfg, ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu"), "model_cfg")
        for key in ("embed_dim", "vision_cfg", "text_cfg"):
            if key not in model_cfg:
                raise ValueError(f"model_cfg lacks {key!r}")
        if not isinstance(model_cfg.get("quick_gelu", False), bool):
            raise ValueError(f"model_cfg.quick_gelu is {model_cfg['quick_gelu']!r}: it must be True or False")
        if not isinstance(model_cfg["embed_dim"], int) or model_cfg["embed_dim"] < 1:
            raise ValueError(f"model_cfg.embed_dim is {model_cfg['embed_dim']!r}: it must be an int of at least 1")
        vision = dict(model_cfg["vision_cfg"])
        if isinstance(vision.get("image_size"), int):
            vision["image_size"] = (vision["image_size"],) * 2
        return cls(
            embed_dim=model_cfg["embed_dim"],
            vision=from_mapping(VisionConfig, vision, "vision_cfg"),
            text=from_mapping(TextConfig, model_cfg["text_cfg"], "text_cfg"),
            quick_gelu=model_cfg.get("quick_gelu", False),
        )

    def to_open_clip(self) -> dict[str, Any]:
        """The `model_cfg` that makes open_clip build the same model: what differs from its defaults, and all sizes."""
        vision = _without_defaults(self.vision, ("image_size", "patch_size", "width", "layers", "head_width"))
        if self.vision.image_size[0] == self.vision.image_size[1]:
            vision["image_size"] = self.vision.image_size[0]
        text = _without_defaults(self.text, ("context_length", "vocab_size", "width", "heads", "layers"))
        cfg: dict[str, Any] = {"embed_dim": self.embed_dim, "vision_cfg": vision, "text_cfg": text}
        return cfg | ({"quick_gelu": True} if self.quick_gelu else {})


def _without_defaults(config: Any, always: tuple[str, ...]) -> dict[str, Any]:
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name in always or getattr(config, field.name) != field.default
    }


def _check_positive(config: Any, where: str, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{where}.{name} is {getattr(config, name)}: it must be at least 1")
