"""Handwritten digits in minutes on a CPU: a full-precision teacher, then a ternary student distilled from it.

    tclip train --config quickstart:teacher --workdir runs/teacher
    tclip train --config quickstart:student --config.teacher=runs/teacher --workdir runs/student

`tclip quickstart` runs both. quickstart:student,runlocal is a test that takes seconds.
"""

from __future__ import annotations

import ml_collections

from tclip_jax.runs.config import base_config


def get_config(arg: str = "teacher") -> ml_collections.ConfigDict:
    """Return the configuration; `arg` is teacher or student, with an optional suffix ",runlocal"."""
    who, _, mode = arg.partition(",")
    if who not in ("teacher", "student") or mode not in ("", "runlocal"):
        raise ValueError(f"quickstart:{arg}: write quickstart:teacher or quickstart:student, and ,runlocal if wanted")
    config = base_config()
    if who == "teacher":
        config.model.embed_dim = 96
        config.model.vision_cfg.update({"width": 96, "layers": 4})
        config.model.text_cfg.update({"width": 96, "heads": 3, "layers": 2})
    else:
        config.ternary = "Q-ALL"
        config.loss.update({"task": 1.0, "crd": 1.0, "fd": 1.0, "fd_kind": "cosine"})
    config.model.text_cfg.context_length = 16  # the longest caption has 11 tokens
    config.remat = True  # on a CPU, recomputing in cache is faster than reading activations from memory
    config.loss.positives = "equal_text"  # a batch repeats the captions of ten classes
    config.data.update({"source": "digits", "augment": "affine", "batch_size": 128})
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 50, "clip_norm": 1.0})
    config.steps = 400 if who == "teacher" else 500
    config.checkpoint.every = 250
    config.eval.update({"source": "digits", "split": "test", "every": 100})
    if mode == "runlocal":
        config.steps, config.data.batch_size, config.optimizer.warmup_steps = 4, 16, 1
    return config
