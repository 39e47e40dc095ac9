"""Each configuration of open_clip whose towers are its own or SigLIP's gives open_clip's model, one block deep."""

from __future__ import annotations

import pytest

from benchmarks import open_clip_models
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.timm_cfg import from_timm, is_timm_siglip

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")

pytestmark = [pytest.mark.torch, pytest.mark.slow]

CONFIGS = {name: open_clip_models.config_of(name) for name in open_clip.list_models()}
KNOWN = {name: config for name, config in CONFIGS.items() if isinstance(config, CLIPConfig)}


@pytest.mark.parametrize("name", KNOWN)  # tests/models/test_open_clip_cfg.py counts them
def test_embeddings_and_weights(name: str) -> None:
    row = open_clip_models.measure(name, KNOWN[name])
    assert row.exact
    assert row.image < 1e-5
    assert row.text < 1e-5


def test_every_siglip_of_timm_is_known_with_its_shape() -> None:
    timm = open_clip.timm_model.timm
    names = [name for name in timm.list_models("*siglip*") if "naflex" not in name and "so150m" not in name]
    assert len(names) > 30
    for name in names:
        assert is_timm_siglip(name), name
        with torch.device("meta"):
            trunk = timm.create_model(name, depth=1, num_classes=0)
        size = trunk.patch_embed.img_size[0]
        cfg = {"timm_model_name": name, "image_size": size, "timm_pool": "", "timm_proj": "none"}
        fields, block = from_timm(cfg), trunk.blocks[0]
        tanh = "tanh" in type(block.mlp.act).__name__.lower()
        assert fields["approximate"] == ("tanh" if tanh else "none"), name
        assert fields["pool_type"] == ("avg" if "gap" in name else "map") == trunk.global_pool, name
        assert (fields["width"], fields["head_width"]) == (trunk.embed_dim, block.attn.head_dim), name
        assert int(fields["width"] * fields["mlp_ratio"]) == block.mlp.fc1.out_features, name
        assert (fields["patch_size"], fields["norm_eps"]) == (trunk.patch_embed.patch_size[0], block.norm1.eps), name
