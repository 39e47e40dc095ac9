"""Small models for tests of exports: rules, random parameters, and every option of the towers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from hypothesis import strategies as st

from tclip_jax.artifacts import pack_params
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import ATTENTION, MLP, PATCH_EMBEDDING, TOKEN_EMBEDDING, TernaryRules, ternary_rules
from tclip_jax.ternary import Quantizer, TernaryTensor

VISION = VisionConfig(image_size=(16, 16), patch_size=8, width=48, layers=2, head_width=16)
TEXT = TextConfig(context_length=8, vocab_size=60, width=32, heads=2, layers=1)

RULES: dict[str, TernaryRules] = {
    "Q-ALL": ternary_rules("Q-ALL", Quantizer()),
    "Q-FFN": ternary_rules("Q-FFN", Quantizer(group=32)),
    "everything": ((".*", Quantizer(group="channel")),),
    "mixed": (
        (MLP, Quantizer(kind="twn", scale_bits=11)),
        (ATTENTION, Quantizer(group="tensor", scale_bits=24)),
        (TOKEN_EMBEDDING, Quantizer(factor=1.0, group=32)),
    ),
    "learned": ((MLP, Quantizer(kind="lsq")), (PATCH_EMBEDDING, Quantizer(group=64))),
}

_SIDES = st.sampled_from([(16, 16), (16, 24), (19, 13)])
_WIDTH = 20  # of the embeddings

_clip_visions = st.builds(
    VisionConfig,
    image_size=_SIDES,
    patch_size=st.sampled_from([5, 8]),
    width=st.sampled_from([16, 48]),
    head_width=st.sampled_from([8, 16]),
    layers=st.integers(1, 2),
    mlp_ratio=st.sampled_from([1.5, 4.0]),
    ls_init_value=st.sampled_from([None, 0.1]),
    pool_type=st.sampled_from(["tok", "avg"]),
    no_ln_pre=st.booleans(),
    final_ln_after_pool=st.booleans(),
    norm_eps=st.sampled_from([1e-5, 1e-3]),
)
_siglip_visions = st.builds(
    VisionConfig,
    image_size=_SIDES,
    patch_size=st.sampled_from([5, 8]),
    width=st.just(_WIDTH),
    head_width=st.sampled_from([4, 10]),
    layers=st.integers(1, 2),
    pool_type=st.sampled_from(["map", "avg"]),
    no_ln_pre=st.just(True),
    class_token=st.just(False),
    patch_bias=st.booleans(),
    projection=st.booleans(),
)
_texts = st.builds(
    TextConfig,
    context_length=st.integers(3, 9),
    vocab_size=st.integers(10, 80),
    width=st.sampled_from([5, 6, 32, 36]),  # rows of 5 and 6 do not end with a byte
    heads=st.just(1),
    layers=st.integers(1, 2),
    ls_init_value=st.sampled_from([None, 0.1]),
    pool_type=st.sampled_from(["argmax", "last", "first", "eos"]),
    no_causal_mask=st.booleans(),
    norm_eps=st.sampled_from([1e-5, 1e-3]),
    proj_bias=st.booleans(),
)
_unprojected = _texts.map(
    lambda text: dataclasses.replace(text, width=_WIDTH, heads=2, proj_bias=False, proj_type="none")
)


def draw_params(config: CLIPConfig, rules: TernaryRules, seed: int = 0, deviation: float = 0.1) -> dict[str, Any]:
    """Return packed random parameters, none of which is 0 or 1."""
    rng = np.random.default_rng(seed)

    def leaf(path: Any, shape: Any) -> Any:
        mean = 1.0 if path[-1].key in ("scale", "logit_scale") else 0.0
        return (mean + deviation * rng.standard_normal(shape.shape)).astype(np.float32)

    return pack_params(jax.tree_util.tree_map_with_path(leaf, param_shapes(config, rules)), rules)


def ternary(shape: tuple[int, int], group: int, axis: int = -2, seed: int = 0) -> TernaryTensor:
    """A weight (K, N), or a table (V, W), with scales of 8 bits."""
    rng, scales = np.random.default_rng(seed), list(shape)
    scales[axis] = -(-shape[axis] // group)
    trits: Any = rng.integers(-1, 2, shape, np.int8)
    scale: Any = (rng.integers(128, 256, scales) / 4096).astype(np.float32)
    return TernaryTensor(trits, scale, group, axis)


@st.composite
def clip_configs(draw: st.DrawFn) -> CLIPConfig:
    """Draw a model."""
    config = CLIPConfig(
        _WIDTH,
        draw(_clip_visions | _siglip_visions),
        draw(_texts | _unprojected),
        init_logit_bias=draw(st.sampled_from([None, -10.0])),
    )
    activation = draw(st.sampled_from(["gelu", "quick_gelu", "gelu_tanh", "gelu_tanh of texts"]))
    if activation == "quick_gelu":
        return dataclasses.replace(config, quick_gelu=True)
    if "tanh" not in activation:
        return config
    text = dataclasses.replace(config.text, approximate="tanh")
    vision = dataclasses.replace(config.vision, approximate="none" if "texts" in activation else "tanh")
    return dataclasses.replace(config, vision=vision, text=text)
