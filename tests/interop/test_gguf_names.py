from __future__ import annotations

import numpy as np

from tclip_jax.artifacts.pack import flatten
from tclip_jax.interop import hugging_face
from tclip_jax.interop.gguf_names import table
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import PRESETS

# clip.cpp abbreviates the names of transformers' CLIPModel.
WORDS = {
    "vision_model.": "v.",
    "text_model.": "t.",
    "embeddings.": "",
    "embedding": "embd",
    "encoder.layers": "blk",
    "pre_layrnorm": "pre_ln",
    "post_layernorm": "post_ln",
    "final_layer_norm": "post_ln",
    "layer_norm": "ln",
    "self_attn.": "attn_",
    "q_proj.": "q.",
    "k_proj.": "k.",
    "v_proj.": "v.",
    "out_proj.": "out.",
    "mlp.fc1": "ffn_down",
    "mlp.fc2": "ffn_up",
}


def test_names_are_clip_cpps_abbreviations_of_clip_models() -> None:
    config = CLIPConfig.from_open_clip(PRESETS["ViT-B-16"])
    expected = set()
    for entry in hugging_face.hugging_face_table(config):
        name = entry.key
        for word, short in WORDS.items():
            name = name.replace(word, short)
        expected.add(name)
    entries = table({path: leaf.shape for path, leaf in flatten(param_shapes(config)).items()})
    assert {entry.name for entry in entries} == expected - {"logit_scale"}
    assert len(entries) == 397


def test_views_of_one_parameter_cover_it_once() -> None:
    config = CLIPConfig.from_open_clip(PRESETS["tiny"])
    shapes = {path: leaf.shape for path, leaf in flatten(param_shapes(config)).items()}
    seen = {path: np.zeros(shape, np.int8) for path, shape in shapes.items() if path != "logit_scale"}
    for entry in table(shapes):
        entry.view(seen[entry.path])[...] += 1
    assert all((count == 1).all() for count in seen.values())


def test_a_view_has_its_outputs_first() -> None:
    config = CLIPConfig.from_open_clip(PRESETS["tiny"])
    shapes = {path: leaf.shape for path, leaf in flatten(param_shapes(config)).items()}
    views = {entry.name: entry for entry in table(shapes)}
    qkv = np.arange(3 * 64 * 192).reshape(3, 64, 192)
    np.testing.assert_array_equal(views["v.blk.2.attn_k.weight"].view(qkv), qkv[2, :, 64:128].T)
    patches = np.arange(8 * 8 * 3 * 64).reshape(8, 8, 3, 64)
    assert views["v.patch_embd.weight"].view(patches)[5, 2, 3, 4] == patches[3, 4, 2, 5]
