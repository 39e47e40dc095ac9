"""Named model shapes, as open_clip's `model_cfg` and `preprocess_cfg`."""

from __future__ import annotations

import copy
import json
from typing import Any

from etils import epath

from tclip_jax.data.images import OPENAI_MEAN, OPENAI_STD
from tclip_jax.schema import check_keys


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


PRESETS: dict[str, dict[str, Any]] = {
    "ViT-B-32": _model_cfg(512, (224, 32, 768, 12), (77, 512, 8, 12)),
    "ViT-B-16": _model_cfg(512, (224, 16, 768, 12), (77, 512, 8, 12)),
    "ViT-B-16-quickgelu": _model_cfg(512, (224, 16, 768, 12), (77, 512, 8, 12)) | {"quick_gelu": True},
    "ViT-L-14": _model_cfg(768, (224, 14, 1024, 24), (77, 768, 12, 12)),
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


def preprocess_cfg() -> dict[str, Any]:
    """Return the `preprocess_cfg` of the presets: OpenAI's mean and standard deviation, bicubic, short side to size."""
    return {
        "mean": OPENAI_MEAN,
        "std": OPENAI_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
