"""The shape of a CLIP model, with the field names of open_clip."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from tclip_jax.models.open_clip_cfg import native_cfg
from tclip_jax.schema import check_keys, check_values, from_mapping, key


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The shape of the vision transformer, open_clip's `vision_cfg`.

    Raises:
      ValueError: a value is outside its range, the image is smaller than a patch, or `head_width` does not divide
        `width`.
    """

    image_size: tuple[int, int] = key((224, 224), "height and width in pixels, or one number for both", ge=1)
    patch_size: int = key(16, "pixels; right and lower edges without a whole patch are ignored", ge=1)
    width: int = key(768, "channels of the residual stream", ge=1)
    layers: int = key(12, "number of blocks", ge=1)
    head_width: int = key(64, "channels of an attention head; must divide width", ge=1)
    mlp_ratio: float = key(4.0, "hidden channels of an MLP, divided by width", gt=0)
    ls_init_value: float | None = key(None, "initial value of LayerScale; None: no LayerScale")
    pool_type: Literal["tok", "avg"] = key("tok", "tok: the class token; avg: the mean of the patches")
    no_ln_pre: bool = key(False, "no LayerNorm before the blocks")
    final_ln_after_pool: bool = key(False, "the last LayerNorm follows the pooling instead of preceding it")

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
        """Number of attention heads."""
        return self.width // self.head_width

    @property
    def grid(self) -> tuple[int, int]:
        """Number of patches along the height and the width."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The shape of the text transformer, open_clip's `text_cfg`.

    Raises:
      ValueError: a value is outside its range, or `heads` does not divide `width`.
    """

    context_length: int = key(77, "tokens of a text", ge=1)
    vocab_size: int = key(49408, "number of different tokens", ge=1)
    width: int = key(512, "channels of the residual stream", ge=1)
    heads: int = key(8, "attention heads; must divide width", ge=1)
    layers: int = key(12, "number of blocks", ge=1)
    mlp_ratio: float = key(4.0, "hidden channels of an MLP, divided by width", gt=0)
    ls_init_value: float | None = key(None, "initial value of LayerScale; None: no LayerScale")
    pool_type: Literal["argmax", "last"] = key(
        "argmax", "argmax: the token with the largest id, which ends a text; last: the last token"
    )
    no_causal_mask: bool = key(False, "every token attends to all tokens")

    def __post_init__(self) -> None:
        check_values(TextConfig, vars(self), "text_cfg")
        if self.width % self.heads:
            raise ValueError(f"text width {self.width} is not divisible by {self.heads} heads")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """The shape of a CLIP model.

    Attributes:
      embed_dim: width of the shared embedding space.
      vision: shape of the vision transformer.
      text: shape of the text transformer.
      quick_gelu: whether the activation is x · sigmoid(1.702 x) instead of GELU (erf).
    """

    embed_dim: int = key(doc="width of the embeddings that images and texts share")
    vision: VisionConfig = key(doc="the vision transformer")
    text: TextConfig = key(doc="the text transformer")
    quick_gelu: bool = key(False, "x · sigmoid(1.702 x) instead of GELU (erf)")

    @classmethod
    def from_open_clip(cls, model_cfg: Mapping[str, Any]) -> CLIPConfig:
        """Create a configuration from a `model_cfg` of open_clip.

        Other fields of open_clip are accepted if they do not change the model: at their default, or unused because of
        another field.

        Args:
          model_cfg: as in open_clip's model_configs.

        Raises:
          ValueError: the model is not supported (the message has the field and its meaning in open_clip), a key is
            unknown (the message has the nearest known key), or a value is outside its range.
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
        """Return the `model_cfg` from which open_clip builds the same model: all sizes, and the fields that differ from
        its defaults.
        """
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
