"""CLIP-KD (CVPR 2024, arXiv 2307.12732): full-precision ViT-B/16, distilled from ViT-L/14 on CC3M and CC12M.

    tclip train --config clip_kd --config.data.source=folder:/data/cc3m_cc12m --workdir runs/clip_kd

The paper reports a zero-shot accuracy on ImageNet of 57.5 % with distillation and 37.0 % without. `runlocal` is a test
that takes seconds:

    tclip train --config quickstart:teacher,runlocal --workdir runs/teacher
    tclip train --config clip_kd:runlocal --config.teacher=runs/teacher --workdir runs/student
"""

from __future__ import annotations

import ml_collections

from tclip_jax.models.presets import model_cfg
from tclip_jax.runs.config import base_config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Return the configuration; `arg` is "" or "runlocal"."""
    if arg not in ("", "runlocal"):
        raise ValueError(f"clip_kd:{arg}: write clip_kd, or clip_kd:runlocal")
    config = base_config()
    config.model = model_cfg("ViT-B-16")
    config.teacher = "hf-hub:laion/CLIP-ViT-L-14-laion2B-s32B-b82K"
    config.data.update({"source": "folder:data/cc3m_cc12m", "augment": "random_resized_crop"})
    config.data.update({"batch_size": 1024, "workers": 8})
    config.dtype, config.remat = "bfloat16", True
    config.loss.update({"task": 1.0, "crd": 1.0, "icl": 1.0, "fd": 2000.0})
    config.optimizer.update({"learning_rate": 1e-3, "weight_decay": 0.1, "warmup_steps": 10_000})
    config.steps = 420_000  # 32 epochs of 13.5 million pairs
    config.checkpoint.every = 2000
    if arg:
        config.model = model_cfg("tiny")
        config.model.text_cfg.context_length = 16
        config.teacher = "runs/teacher"
        config.data.update({"source": "digits", "batch_size": 16, "workers": 0})
        config.dtype, config.steps, config.optimizer.warmup_steps = "float32", 4, 1
    return config
