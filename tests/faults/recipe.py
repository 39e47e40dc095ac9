"""A very small run: digits, one layer in each tower."""

from __future__ import annotations

import ml_collections

from tclip_jax.runs.config import base_config


def get_config(_: str = "") -> ml_collections.ConfigDict:
    config = base_config()
    config.model.embed_dim = 8
    config.model.vision_cfg.update({"image_size": 16, "patch_size": 8, "width": 8, "layers": 1, "head_width": 8})
    config.model.text_cfg.update({"context_length": 12, "width": 8, "heads": 1, "layers": 1})
    config.ternary = "Q-ALL"
    config.data.update({"batch_size": 8, "augment": "affine"})
    config.optimizer.warmup_steps = 2
    config.steps, config.checkpoint.every = 12, 3
    config.loss.positives = "equal_text"
    config.telemetry_every = 0
    return config
