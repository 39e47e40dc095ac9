"""TernaryCLIP (arXiv 2510.21879): ViT-B/16 with ternary weights, distilled from LAION's ViT-L/14 on CC12M.

    tclip train --config ternaryclip:Q-ALL --config.data.source=folder:/data/cc12m --workdir runs/ternaryclip

`ternaryclip:Q-FFN` ternarizes only the MLPs; `ternaryclip:none` is the full-precision student of the same recipe. The
paper does not publish its losses and schedule. This recipe uses those of CLIP-KD (arXiv 2307.12732), which has the same
teacher and student and similar data. docs/reproduce.md has every command, from the download to the 41 data sets.

`ternaryclip:Q-ALL,8gpu` is the same run on one node of 8 GPUs of 80 GB. The batch stays at 1,024 pairs, 128 per GPU. By
`tclip plan` it takes 11.6 GiB per GPU without recomputing activations, so `remat` is off, which saves a forward pass:

    tclip launch slurm --nodes 1 -- train --config ternaryclip:Q-ALL,8gpu --config.data.source=… --workdir …

`runlocal` is a test on digits that takes seconds:

    tclip train --config quickstart:teacher,runlocal --workdir runs/teacher
    tclip train --config ternaryclip:Q-ALL,runlocal --config.teacher=runs/teacher --workdir runs/student
"""

from __future__ import annotations

import ml_collections

from tclip_jax.models.presets import model_cfg
from tclip_jax.models.ternary_rules import TERNARY_SETS
from tclip_jax.runs.config import base_config


def get_config(arg: str = "Q-ALL") -> ml_collections.ConfigDict:
    """Return the configuration; `arg` is none, Q-FFN or Q-ALL, with an optional suffix ",8gpu" or ",runlocal"."""
    which, _, mode = arg.partition(",")
    if which not in TERNARY_SETS or mode not in ("", "8gpu", "runlocal"):
        raise ValueError(f"ternaryclip:{arg}: write one of {', '.join(TERNARY_SETS)}, and ,8gpu or ,runlocal if wanted")
    config = base_config()
    config.ternary = which
    config.model = model_cfg("ViT-B-16")
    config.teacher = "hf-hub:laion/CLIP-ViT-L-14-laion2B-s32B-b82K"  # mean = std = 0.5
    config.data.update({"source": "folder:data/cc12m", "augment": "random_resized_crop"})
    config.data.update({"batch_size": 1024, "workers": 8})
    config.dtype, config.remat = "bfloat16", True
    config.loss.update({"task": 1.0, "crd": 1.0, "icl": 1.0, "fd": 2000.0})
    config.optimizer.update({"learning_rate": 1e-3, "weight_decay": 0.1, "warmup_steps": 10_000})
    if which != "none":
        config.optimizer.latent_clip = 1.0  # docs/accuracy.md, the study of methods
    config.steps = 330_000  # 32 epochs of the 10.5 million pairs of CC12M that are still online
    config.checkpoint.every = 2000
    if mode == "8gpu":
        config.remat = False
    if mode == "runlocal":
        config.model = model_cfg("tiny")
        config.model.text_cfg.context_length = 16
        config.teacher = "runs/teacher"
        config.data.update({"source": "digits", "batch_size": 16, "workers": 0})
        config.dtype, config.steps, config.optimizer.warmup_steps = "float32", 4, 1
    return config
