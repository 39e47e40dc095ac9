"""Each configuration of open_clip whose towers are its own or SigLIP's gives open_clip's model, one block deep."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from tclip_jax.interop.open_clip import from_open_clip, to_open_clip
from tclip_jax.models.clip import CLIP
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.timm_cfg import from_timm, is_timm_siglip

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")

pytestmark = [pytest.mark.torch, pytest.mark.slow]

VOCABULARY = 1000
CONFIGS = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}


def _is_known(cfg: dict[str, Any]) -> bool:
    try:
        CLIPConfig.from_open_clip(cfg)
    except ValueError:
        return False
    return True


KNOWN = [name for name, cfg in CONFIGS.items() if _is_known(cfg)]  # tests/models/test_open_clip_cfg.py counts them


def shallow(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """open_clip's model of this name with one block in each tower and a small vocabulary, drawn at random."""
    cfg = copy.deepcopy(CONFIGS[name])
    cfg["text_cfg"] |= {"layers": 1, "vocab_size": VOCABULARY, "hf_tokenizer_name": None}
    cfg["vision_cfg"] |= {} if cfg["vision_cfg"].get("timm_model_name") else {"layers": 1}
    if cfg["vision_cfg"].get("timm_model_name"):
        timm = open_clip.timm_model.timm
        monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=1))
    build = open_clip.CustomTextCLIP if cfg.pop("custom_text", False) else open_clip.CLIP
    torch.manual_seed(0)
    module = build(**cfg).eval()
    with torch.no_grad():
        for parameter in module.parameters():  # biases and gains differ from zeros and ones
            parameter += 0.02 * torch.randn_like(parameter)
    return module


@pytest.mark.parametrize("name", KNOWN)
def test_embeddings_and_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CLIPConfig.from_open_clip(CONFIGS[name])
    assert CLIPConfig.from_open_clip(config.to_open_clip()) == config
    module = shallow(name, monkeypatch)
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, layers=1),
        text=dataclasses.replace(config.text, layers=1, vocab_size=VOCABULARY),
    )
    state = {key: value.numpy() for key, value in module.state_dict().items()}
    params = from_open_clip(state, config)
    written = to_open_clip(params, config)
    assert written.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(written[key], value)
    generator = np.random.default_rng(0)
    pixels = generator.standard_normal((2, *config.vision.image_size, 3)).astype(np.float32)
    tokens = generator.integers(3, VOCABULARY, (2, config.text.context_length)).astype(np.int32)
    tokens[:, 5] = config.text.eos_id
    with torch.no_grad():
        image = module.encode_image(torch.from_numpy(pixels.transpose(0, 3, 1, 2)), normalize=True)
        text = module.encode_text(torch.from_numpy(tokens).long(), normalize=True)
    ours = jax.jit(CLIP(config).apply)({"params": params}, pixels, tokens)
    np.testing.assert_allclose(ours[0], image.numpy(), atol=1e-5)  # type: ignore[index]
    np.testing.assert_allclose(ours[1], text.numpy(), atol=1e-5)  # type: ignore[index]


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
