"""The models of big_vision: which can be expressed, and what the shapes of a checkpoint show of its model."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from etils import epath

from tclip_jax.artifacts.safetensors import LazyArray
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.open_clip import check_options, mlp_ratio
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.presets import SIGLIP_PIXELS

POSITIONS = "img/pos_embedding"
ATTENTION = "MultiHeadDotProductAttention_0"

_EPSILON = 1e-6  # of Flax, which big_vision does not change
# The tokenizers of texts in big_vision, by their number of tokens; it is never CLIP's.
_TOKENIZERS = {32_000: "c4_en", 250_000: "mc4", 256_000: "gemma"}

_log = logging.getLogger(__name__)


def check_big_vision(config: CLIPConfig) -> None:
    """Raise ValueError, naming the option, if big_vision's models cannot express the model."""
    vision, text = config.vision, config.text
    check_options(
        "big_vision's models",
        ("quick_gelu", config.quick_gelu, False),
        ("vision_cfg.no_ln_pre", vision.no_ln_pre, True),
        ("vision_cfg.patch_bias", vision.patch_bias, True),
        ("vision_cfg.class_token", vision.class_token, vision.pool_type == "tok"),
        ("vision_cfg.final_ln_after_pool", vision.final_ln_after_pool and vision.pool_type == "avg", False),
        ("vision_cfg.ls_init_value", vision.ls_init_value, None),
        ("vision_cfg.norm_eps", vision.norm_eps, _EPSILON),
        ("text_cfg.pool_type", text.pool_type, "last"),
        ("text_cfg.no_causal_mask", text.no_causal_mask, True),
        ("text_cfg.proj_bias", text.proj_bias, text.proj_type == "linear"),
        ("text_cfg.ls_init_value", text.ls_init_value, None),
        ("text_cfg.norm_eps", text.norm_eps, _EPSILON),
    )


def gelu_notes(config: CLIPConfig) -> list[str]:
    """Return a line for each tower in which big_vision, which ignores the configuration, computes another GELU."""
    towers = [name for name, cfg in (("image", config.vision), ("text", config.text)) if cfg.approximate != "tanh"]
    return [
        f"big_vision approximates GELU by tanh, and the {tower} tower does not: embeddings differ by about 1e-3"
        for tower in towers
    ]


def config_of_shapes(tensors: Mapping[str, LazyArray]) -> CLIPConfig:
    """Return the model that the shapes of a checkpoint show; what they do not show is big_vision's default.

    The default is GELU by tanh, a LayerNorm epsilon of 1e-6, no causal mask, the mean of the patches if the image
    tower has neither a class token nor a MAP head, and the last token of a text.

    Raises:
      ValueError: arrays are missing, or their shapes are not those of two transformers.
    """
    try:
        patch, _, _, width = tensors["img/embedding/kernel"].shape
        _, patches, _ = tensors[POSITIONS].shape
        vocabulary, text_width = tensors["txt/Embed_0/embedding"].shape
        _, context, _ = tensors["txt/pos_embedding"].shape
        image, text = _tower(tensors, "img/Transformer"), _tower(tensors, "txt/Encoder_0")
        heads = {tower: tensors.get(f"{tower}/head/kernel") for tower in ("img", "txt")}
        embed_dim = text_width if heads["txt"] is None else heads["txt"].shape[1]
    except (LookupError, ValueError) as error:
        raise ValueError(f"it is not a model of two transformers: {error}") from None
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(
            f"{POSITIONS} has {patches} positions, not a square grid: name the model with --preset or --model-cfg"
        )
    return CLIPConfig(
        embed_dim,
        VisionConfig(
            image_size=(side * patch, side * patch),
            patch_size=patch,
            width=width,
            layers=image["layers"],
            head_width=width // max(image["heads"], 1),
            mlp_ratio=mlp_ratio(width, image["hidden"]),
            pool_type="tok" if "img/cls" in tensors else "map" if "img/MAPHead_0/probe" in tensors else "avg",
            no_ln_pre=True,
            norm_eps=_EPSILON,
            approximate="tanh",
            class_token="img/cls" in tensors,
            patch_bias=True,
            projection=heads["img"] is not None,
        ),
        TextConfig(
            context_length=context,
            vocab_size=vocabulary,
            width=text_width,
            heads=text["heads"],
            layers=text["layers"],
            mlp_ratio=mlp_ratio(text_width, text["hidden"]),
            pool_type="last",
            no_causal_mask=True,
            norm_eps=_EPSILON,
            approximate="tanh",
            proj_bias="txt/head/bias" in tensors,
            proj_type="none" if heads["txt"] is None else "linear",
            hf_tokenizer_name=_TOKENIZERS.get(vocabulary, "big_vision"),
        ),
        init_logit_bias=-10.0 if "b" in tensors else None,
    )


def _tower(tensors: Mapping[str, LazyArray], blocks: str) -> dict[str, int]:
    layers = sum(name.startswith(f"{blocks}/encoderblock_") and name.endswith("/LayerNorm_0/scale") for name in tensors)
    _, heads, _ = tensors[f"{blocks}/encoderblock_0/{ATTENTION}/query/kernel"].shape
    _, hidden = tensors[f"{blocks}/encoderblock_0/MlpBlock_0/Dense_0/kernel"].shape
    return {"layers": layers, "heads": heads, "hidden": hidden}


def default_preprocess(config: CLIPConfig) -> Preprocess:
    """Return the preprocessing of open_clip's SigLIPs. big_vision's own resizes by bilinear interpolation."""
    return Preprocess.from_open_clip(SIGLIP_PIXELS, config.vision.image_size)


def warn_of_defaults(source: epath.PathLike, config: CLIPConfig, pixels: Preprocess) -> None:
    """Log everything that was assumed of a checkpoint because its shapes do not show it."""
    _log.warning(
        "%s states no configuration: assuming images of %dx%d, pooling of the image tower by %s and of a text by its"
        " last token, GELU by tanh, LayerNorm's epsilon 1e-6, no causal mask, tokenizer %r, and %s %s to %dx%d with"
        " mean (%s), std (%s); --preset or --model-cfg state others",
        source,
        *config.vision.image_size,
        config.vision.pool_type,
        config.text.hf_tokenizer_name,
        pixels.interpolation,
        pixels.resize_mode,
        *pixels.size,
        *(", ".join(map(str, values)) for values in (pixels.mean, pixels.std)),
    )
