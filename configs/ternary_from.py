"""A ternary model from any model that `tclip import` reads: CLIP or SigLIP, distilled from itself.

    tclip train --config ternary_from:MODEL --config.data.source=wds:… --workdir runs/ternary

MODEL is an artifact, a run, or a checkpoint of another library. The student has its architecture, preprocessing and
weights, and it is the teacher too; `--config.teacher=…` names another one, such as a larger model. A plan needs no
weights, so there MODEL may be a preset:

    tclip plan --config ternary_from:ViT-B-16-SigLIP2 --topology v5litepod-16

The loss is the model's own (sigmoid for a model with a bias of the logits, InfoNCE for others) plus CRD. CRD compares
softmaxes of similarities. A SigLIP has none; it takes those of scale · similarity, in which the bias of the logits
cancels. ICL and FD are off: they compare the student's embeddings through a matrix that starts random, whereas this
student's embeddings start where the teacher's are.

`runlocal` is a test on digits that takes seconds:

    tclip train --config quickstart:teacher,runlocal --workdir runs/teacher
    tclip train --config ternary_from:runs/teacher,runlocal --workdir runs/student
"""

from __future__ import annotations

import ml_collections

from tclip_jax.data.images import Preprocess
from tclip_jax.inference.load import Architecture, find_architecture
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import PRESETS, model_cfg, preprocess_cfg
from tclip_jax.runs.config import base_config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Return the configuration; `arg` is a model or a preset, with an optional suffix ",runlocal"."""
    source = arg.removesuffix(",runlocal")
    if not source:
        raise ValueError("ternary_from: write ternary_from:MODEL, an artifact, a run, a checkpoint, or a preset")
    try:
        model = _preset(source) if source in PRESETS else find_architecture(source)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"ternary_from:{arg}: {error}") from None
    config = base_config()
    config.model = model.config.to_open_clip()
    pixels = model.preprocess.to_open_clip()
    config.preprocess.update({key: pixels[key] for key in config.preprocess})  # the size is the model's
    config.teacher = config.init = source
    config.ternary = "Q-ALL"
    config.data.update({"source": "folder:data/pairs", "augment": "random_resized_crop"})
    config.data.update({"batch_size": 1024, "workers": 8})
    config.dtype, config.remat = "bfloat16", True
    config.loss.task_kind = "info_nce" if model.config.init_logit_bias is None else "sigmoid"
    config.loss.update({"task": 1.0, "crd": 1.0})
    # A tenth of CLIP-KD's rate, because the weights are trained. No recovery phase at the end: it costs accuracy in
    # docs/accuracy.md, so the cosine decay goes to the last step.
    config.optimizer.update({"learning_rate": 1e-4, "weight_decay": 0.1, "warmup_steps": 2000, "clip_norm": 1.0})
    config.optimizer.latent_clip = 1.0  # docs/accuracy.md, the study of methods
    config.steps = 50_000
    config.checkpoint.every = 2000
    if arg != source:
        config.data.update({"source": "digits", "batch_size": 16, "workers": 0})
        config.dtype, config.steps, config.optimizer.warmup_steps = "float32", 4, 1
    return config


def _preset(name: str) -> Architecture:
    config = CLIPConfig.from_open_clip(model_cfg(name))
    return Architecture(config, Preprocess.from_open_clip(preprocess_cfg(name), config.vision.image_size))
