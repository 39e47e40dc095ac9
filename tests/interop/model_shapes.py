"""Small models with every option of the towers, drawn by hypothesis."""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st

from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig

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
