"""Losses of contrastive training and distillation: pure functions on embeddings and hidden states.

    loss = info_nce(image, text, scale) + crd(image, text, scale, (teacher_image, teacher_text, teacher_scale))

Under `jax.jit` XLA computes the similarities that several losses share once. `compare` computes them explicitly, for
the functions `…_of_rows` of contrastive.py and distillation.py.
"""

from tclip_jax.losses.contrastive import info_nce, interactive_contrastive, retrieval_accuracy, sigmoid_loss
from tclip_jax.losses.distillation import (
    affinity_mimicking,
    crd,
    feature_distillation,
    kl_mix,
    open_clip_distillation,
    relational_agreement,
)
from tclip_jax.losses.exchange import Gather, Ring
from tclip_jax.losses.features import hidden_matching, relation_matching
from tclip_jax.losses.statistics import RowStats, compare, compare_rows

__all__ = [
    "Gather",
    "Ring",
    "RowStats",
    "affinity_mimicking",
    "compare",
    "compare_rows",
    "crd",
    "feature_distillation",
    "hidden_matching",
    "info_nce",
    "interactive_contrastive",
    "kl_mix",
    "open_clip_distillation",
    "relation_matching",
    "relational_agreement",
    "retrieval_accuracy",
    "sigmoid_loss",
]
