"""The shape of a CLIP model, in open_clip's own terms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from tclip_jax.models.open_clip_cfg import native_cfg
from tclip_jax.schema import check_keys, check_values, from_mapping, key


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision transformer (open_clip's `vision_cfg`); `image_size` is (height, width) in pixels."""

    image_size: tuple[int, int] = key((224, 224), "height and width in pixels, or one number", ge=1)
    patch_size: int = key(16, "pixels; what no whole patch covers of an image, right and below, is not seen", ge=1)
    width: int = key(768, "of the residual stream", ge=1)
    layers: int = key(12, "blocks", ge=1)
    head_width: int = key(64, "channels of a head, a divisor of width", ge=1)
    mlp_ratio: float = key(4.0, "hidden channels of an MLP over width", gt=0)
    ls_init_value: float | None = key(None, "LayerScale's first value; None: no LayerScale")
    pool_type: Literal["tok", "avg"] = key("tok", "the class token, or the mean of the patches")
    no_ln_pre: bool = key(False, "no LayerNorm before the blocks")
    final_ln_after_pool: bool = key(False, "the last LayerNorm after pooling, not before")

    def __post_init__(self) -> None:
        size = self.image_size
        object.__setattr__(self, "image_size", (size, size) if isinstance(size, int) else tuple(size))
        check_values(VisionConfig, vars(self), "vision_cfg")
        for side in self.image_size:
            if side < self.patch_size:
                raise ValueError(f"image size {side} is smaller than patch size {self.patch_size}")
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

    context_length: int = key(77, "tokens", ge=1)
    vocab_size: int = key(49408, "tokens that there are", ge=1)
    width: int = key(512, "of the residual stream", ge=1)
    heads: int = key(8, "a divisor of width", ge=1)
    layers: int = key(12, "blocks", ge=1)
    mlp_ratio: float = key(4.0, "hidden channels of an MLP over width", gt=0)
    ls_init_value: float | None = key(None, "LayerScale's first value; None: no LayerScale")
    pool_type: Literal["argmax", "last"] = key(
        "argmax", "the token of the largest number, which ends a text, or the last"
    )
    no_causal_mask: bool = key(False, "every token attends to all")

    def __post_init__(self) -> None:
        check_values(TextConfig, vars(self), "text_cfg")
        if self.width % self.heads:
            raise ValueError(f"text width {self.width} is not divisible by {self.heads} heads")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both towers, the width of the shared embedding, and the activation: GELU (erf), or x · sigmoid(1.702 x)."""

    embed_dim: int
    vision: VisionConfig
    text: TextConfig
    quick_gelu: bool = key(False, "x · sigmoid(1.702 x) in place of GELU (erf)")

    @classmethod
    def from_open_clip(cls, model_cfg: Mapping[str, Any]) -> CLIPConfig:
        """From a `model_cfg` of open_clip.

        Fields of open_clip that say nothing new are accepted: defaults, and what another field makes unused.

        Raises:
          ValueError: a model that this is not, saying what the field means in open_clip; or an unknown key, naming it
            and the nearest that is known.
        """
        model_cfg = native_cfg(model_cfg)
        check_keys(model_cfg, ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu"), "model_cfg")
        for name in ("embed_dim", "vision_cfg", "text_cfg"):
            if name not in model_cfg:
                raise ValueError(f"model_cfg lacks {name!r}")
        check_values(
            cls, {name: model_cfg[name] for name in ("embed_dim", "quick_gelu") if name in model_cfg}, "model_cfg"
        )
        vision = model_cfg["vision_cfg"]
        if isinstance(vision, Mapping) and isinstance(vision.get("image_size"), int):
            vision = {**vision, "image_size": (vision["image_size"],) * 2}
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
