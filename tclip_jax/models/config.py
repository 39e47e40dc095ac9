"""The shape of a CLIP or SigLIP model, with the field names of open_clip."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from tclip_jax.models.open_clip_cfg import native_cfg
from tclip_jax.models.timm_cfg import to_timm
from tclip_jax.schema import check_keys, check_values, from_mapping, key

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
_EPSILON = "what every LayerNorm adds to the variance"
_APPROXIMATE = "tanh: GELU by its approximation with a hyperbolic tangent"


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The shape of the vision transformer, open_clip's `vision_cfg`.

    A SigLIP has no class token, no LayerNorm before the blocks, a bias of the patch embedding, attention pooling and no
    projection.

    Raises:
      ValueError: a value is outside its range, the image is smaller than a patch, `head_width` does not divide
        `width`, or the class token is pooled and there is none.
    """

    image_size: tuple[int, int] = key((224, 224), "height and width in pixels, or one number for both", ge=1)
    patch_size: int = key(16, "pixels; right and lower edges without a whole patch are ignored", ge=1)
    width: int = key(768, "channels of the residual stream", ge=1)
    layers: int = key(12, "number of blocks", ge=1)
    head_width: int = key(64, "channels of an attention head; must divide width", ge=1)
    mlp_ratio: float = key(4.0, "hidden channels of an MLP, divided by width", gt=0)
    ls_init_value: float | None = key(None, "initial value of LayerScale; None: no LayerScale")
    pool_type: Literal["tok", "avg", "map"] = key(
        "tok", "tok: the class token; avg: the mean of the patches; map: SigLIP's attention pooling"
    )
    no_ln_pre: bool = key(False, "no LayerNorm before the blocks")
    final_ln_after_pool: bool = key(False, "the last LayerNorm follows the pooling instead of preceding it")
    norm_eps: float = key(1e-5, _EPSILON, gt=0)
    approximate: Literal["none", "tanh"] = key("none", _APPROXIMATE)
    class_token: bool = key(True, "a learned token precedes the patches")
    patch_bias: bool = key(False, "the patch embedding adds a bias")
    projection: bool = key(True, "a matrix maps the pooled token to the embedding; without it width is embed_dim")

    def __post_init__(self) -> None:
        size = self.image_size
        object.__setattr__(self, "image_size", (size, size) if isinstance(size, int) else tuple(size))
        check_values(VisionConfig, vars(self), "vision_cfg")
        for side in self.image_size:
            if side < self.patch_size:
                raise ValueError(f"image size {side} is smaller than patch size {self.patch_size}")
        if self.width % self.head_width:
            raise ValueError(f"vision width {self.width} is not divisible by head width {self.head_width}")
        if self.pool_type == "tok" and not self.class_token:
            raise ValueError("vision_cfg.pool_type is 'tok', but class_token is false: it must be 'avg' or 'map'")
        if self.pool_type == "map" and self.final_ln_after_pool:
            raise ValueError("vision_cfg.final_ln_after_pool is true: the last LayerNorm precedes the pooling 'map'")

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.width // self.head_width

    @property
    def tokens(self) -> int:
        """Number of tokens: the patches and the class token."""
        return self.grid[0] * self.grid[1] + self.class_token

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
    pool_type: Literal["argmax", "last", "first", "eos"] = key(
        "argmax",
        "argmax: the token with the largest id, which ends a text; last and first: that token; eos: the first eos_id",
    )
    no_causal_mask: bool = key(False, "every token attends to all tokens")
    norm_eps: float = key(1e-5, _EPSILON, gt=0)
    approximate: Literal["none", "tanh"] = key("none", _APPROXIMATE)
    eos_id: int = key(2, "token that ends a text, for pool_type eos", ge=0)
    proj_bias: bool = key(False, "the projection adds a bias")
    proj_type: Literal["linear", "none"] = key("linear", "none: no projection; width is embed_dim")
    hf_tokenizer_name: str = key("", "tokenizer of Hugging Face; empty: CLIP's own")

    def __post_init__(self) -> None:
        check_values(TextConfig, vars(self), "text_cfg")
        if self.pool_type == "eos" and self.eos_id >= self.vocab_size:
            raise ValueError(f"text_cfg.eos_id is {self.eos_id}: it must be below the vocabulary, {self.vocab_size}")
        if self.proj_bias and self.proj_type == "none":
            raise ValueError("text_cfg.proj_bias is true, but proj_type is 'none': there is no projection")
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
      init_logit_bias: initial value of the learned bias of the logits; None for a model without one.

    Raises:
      ValueError: a tower without projection has another width than the embeddings, or QuickGELU is approximated.
    """

    embed_dim: int = key(doc="width of the embeddings that images and texts share")
    vision: VisionConfig = key(doc="the vision transformer")
    text: TextConfig = key(doc="the text transformer")
    quick_gelu: bool = key(False, "x · sigmoid(1.702 x) instead of GELU (erf)")
    init_logit_bias: float | None = key(None, "initial learned bias of the logits, -10 in SigLIP; None: no bias")

    def __post_init__(self) -> None:
        for tower, width, projected in (
            ("vision", self.vision.width, self.vision.projection),
            ("text", self.text.width, self.text.proj_type == "linear"),
        ):
            if not projected and width != self.embed_dim:
                raise ValueError(f"{tower}_cfg has no projection: width {width} must be embed_dim, {self.embed_dim}")
        if self.quick_gelu and "tanh" in (self.vision.approximate, self.text.approximate):
            raise ValueError("quick_gelu is true: QuickGELU has no approximation, so approximate must be 'none'")

    @property
    def towers(self) -> dict[str, tuple[VisionConfig | TextConfig, int]]:
        """The shape of each tower, "image" and "text", and the number of its tokens."""
        return {"image": (self.vision, self.vision.tokens), "text": (self.text, self.text.context_length)}

    def activation(self, tower: VisionConfig | TextConfig) -> Activation:
        """Return the activation of the MLPs of a tower."""
        return "quick_gelu" if self.quick_gelu else "gelu_tanh" if tower.approximate == "tanh" else "gelu"

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
        check_keys(model_cfg, ("embed_dim", "vision_cfg", "text_cfg", *_OPTIONS), "model_cfg")
        for name in ("embed_dim", "vision_cfg", "text_cfg"):
            if name not in model_cfg:
                raise ValueError(f"model_cfg lacks {name!r}")
        options = {name: model_cfg[name] for name in _OPTIONS if name in model_cfg}
        check_values(cls, {"embed_dim": model_cfg["embed_dim"], **options}, "model_cfg")
        vision = model_cfg["vision_cfg"]
        if isinstance(vision, Mapping) and isinstance(vision.get("image_size"), int):
            vision = {**vision, "image_size": (vision["image_size"],) * 2}
        return cls(
            embed_dim=model_cfg["embed_dim"],
            vision=from_mapping(VisionConfig, vision, "vision_cfg"),
            text=from_mapping(TextConfig, model_cfg["text_cfg"], "text_cfg"),
            **options,
        )

    def to_open_clip(self) -> dict[str, Any]:
        """Return the `model_cfg` from which open_clip builds the same model: all sizes, and the fields that differ from
        its defaults.

        An image tower without a class token that is none of timm's has our fields, which open_clip does not know.
        """
        vision = to_timm(self.vision)
        if vision is None:
            vision = _without_defaults(self.vision, ("image_size", "patch_size", "width", "layers", "head_width"))
            if self.vision.image_size[0] == self.vision.image_size[1]:
                vision["image_size"] = self.vision.image_size[0]
        text = _without_defaults(self.text, ("context_length", "vocab_size", "width", "heads", "layers"))
        for section in (vision, text):
            if (epsilon := section.pop("norm_eps", None)) is not None:
                section["norm_kwargs"] = {"eps": epsilon}
            if approximate := section.pop("approximate", None):
                section["act_kwargs"] = {"approximate": approximate}
        cfg: dict[str, Any] = {"embed_dim": self.embed_dim, "vision_cfg": vision, "text_cfg": text}
        if not self.vision.class_token or self.text.proj_bias or self.text.proj_type == "none":
            cfg["custom_text"] = True
        return cfg | {
            name: getattr(self, name) for name in _OPTIONS if getattr(self, name) != getattr(CLIPConfig, name)
        }


_OPTIONS = ("quick_gelu", "init_logit_bias")  # of the whole model


def _without_defaults(config: Any, always: tuple[str, ...]) -> dict[str, Any]:
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name in always or getattr(config, field.name) != field.default
    }
