"""Named model shapes, as open_clip's `model_cfg` and `preprocess_cfg`."""

from __future__ import annotations

import copy
import json
from typing import Any

from etils import epath

from tclip_jax.data.images import OPENAI_MEAN, OPENAI_STD
from tclip_jax.schema import check_keys

_CLIP_PIXELS = {"mean": OPENAI_MEAN, "std": OPENAI_STD, "interpolation": "bicubic", "resize_mode": "shortest"}
SIGLIP_PIXELS = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "squash"}


def _model_cfg(embed_dim: int, image: tuple[int, int, int, int], text: tuple[int, int, int, int]) -> dict[str, Any]:
    size, patch, width, layers = image
    context, text_width, heads, text_layers = text
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {"image_size": size, "patch_size": patch, "width": width, "layers": layers, "head_width": 64},
        "text_cfg": {
            "context_length": context,
            "vocab_size": 49408,
            "width": text_width,
            "heads": heads,
            "layers": text_layers,
        },
        "quick_gelu": False,
    }


def _siglip_cfg(tower: str, size: int, text: tuple[int, int, int], **more: Any) -> dict[str, Any]:
    """Return open_clip's `model_cfg` of a SigLIP or SigLIP 2, whose image tower has this name in timm."""
    width, heads, layers = text
    return {
        "embed_dim": width,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": size,
            "timm_model_name": f"{tower}_siglip_{size}",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 64,
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": width,
            "heads": heads,
            "layers": layers,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
            **more,
        },
    }


def _siglip2(name: str) -> dict[str, Any]:
    """Return what SigLIP 2 adds to the `text_cfg`."""
    return {"vocab_size": 256000, "hf_tokenizer_name": f"timm/{name}", "act_kwargs": {"approximate": "tanh"}}


PRESETS: dict[str, dict[str, Any]] = {
    "ViT-B-32": _model_cfg(512, (224, 32, 768, 12), (77, 512, 8, 12)),
    "ViT-B-16": _model_cfg(512, (224, 16, 768, 12), (77, 512, 8, 12)),
    "ViT-B-16-quickgelu": _model_cfg(512, (224, 16, 768, 12), (77, 512, 8, 12)) | {"quick_gelu": True},
    "ViT-L-14": _model_cfg(768, (224, 14, 1024, 24), (77, 768, 12, 12)),
    "ViT-B-16-SigLIP": _siglip_cfg(
        "vit_base_patch16", 224, (768, 12, 12), vocab_size=32000, hf_tokenizer_name="timm/ViT-B-16-SigLIP"
    ),
    "ViT-B-16-SigLIP2": _siglip_cfg("vit_base_patch16", 224, (768, 12, 12), **_siglip2("ViT-B-16-SigLIP2")),
    "ViT-L-16-SigLIP2-256": _siglip_cfg("vit_large_patch16", 256, (1024, 16, 24), **_siglip2("ViT-L-16-SigLIP2-256")),
    "ViT-SO400M-14-SigLIP2": _siglip_cfg(
        "vit_so400m_patch14", 224, (1152, 16, 27), mlp_ratio=3.7362, **_siglip2("ViT-SO400M-14-SigLIP2")
    ),
    "tiny": _model_cfg(64, (32, 8, 64, 3), (32, 64, 2, 2)),
}
PRESETS["tiny"]["vision_cfg"]["head_width"] = 32


def model_cfg(name: str) -> dict[str, Any]:
    """Return a new `model_cfg` of a preset or of an open_clip JSON file.

    Args:
      name: name of a preset, or the path of a file if it ends in .json.

    Raises:
      ValueError: there is no such preset; the message has the nearest name.
      FileNotFoundError: there is no such file.
    """
    if name.endswith(".json"):
        cfg = json.loads(epath.Path(name).read_text())
        return {"quick_gelu": False} | cfg.get("model_cfg", cfg)
    check_keys([name], PRESETS, "the table of model presets")
    return copy.deepcopy(PRESETS[name])


def preprocess_cfg(preset: str = "") -> dict[str, Any]:
    """Return the `preprocess_cfg` of a preset.

    Args:
      preset: a SigLIP has mean = standard deviation = 0.5, bicubic, both sides to size. Any other name has CLIP's
        default: OpenAI's mean and standard deviation, bicubic, short side to size.
    """
    return copy.deepcopy(SIGLIP_PIXELS if "SigLIP" in preset else _CLIP_PIXELS)
