"""What makes the towers of a SigLIP, in VisionConfig and TextConfig."""

from __future__ import annotations

from typing import Any

VISION: dict[str, Any] = {
    "pool_type": "map",
    "no_ln_pre": True,
    "norm_eps": 1e-6,
    "class_token": False,
    "patch_bias": True,
    "projection": False,
}
TEXT: dict[str, Any] = {"pool_type": "last", "no_causal_mask": True, "norm_eps": 1e-6, "proj_bias": True}
