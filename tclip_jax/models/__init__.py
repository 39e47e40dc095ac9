"""The CLIP model as Flax modules whose weights may be ternary."""

from tclip_jax.models.clip import CLIP, init_params, param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.presets import model_cfg
from tclip_jax.models.ternary_rules import ternary_rules

__all__ = [
    "CLIP",
    "CLIPConfig",
    "TextConfig",
    "VisionConfig",
    "init_params",
    "model_cfg",
    "param_shapes",
    "ternary_rules",
]
