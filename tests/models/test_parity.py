"""The model against open_clip's with the same weights, all of them away from 0 and 1."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tclip_jax.interop.open_clip import from_open_clip
from tclip_jax.losses.contrastive import info_nce
from tclip_jax.models.clip import CLIP
from tclip_jax.models.config import CLIPConfig

pytestmark = pytest.mark.torch

VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 99, "width": 48, "heads": 4, "layers": 2}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "gelu": ({}, {}, False),
    "quick_gelu": ({}, {}, True),
    "head_width": ({"head_width": 32}, {"heads": 2}, False),
    "mlp_ratio": ({"mlp_ratio": 2.5}, {"mlp_ratio": 3.0}, False),
    "not square": ({"image_size": (16, 40)}, {}, False),
    "patches that leave a rest": ({"image_size": (35, 47)}, {}, False),
    "the end by its id": ({}, {"pool_type": "eos", "eos_id": 98}, False),
    "average pool": ({"pool_type": "avg"}, {}, False),
    "average pool, then norm": ({"pool_type": "avg", "final_ln_after_pool": True}, {}, False),
    "token pool, then norm": ({"final_ln_after_pool": True}, {}, False),
    "no ln_pre": ({"no_ln_pre": True}, {}, True),
    "layer scale": ({"ls_init_value": 0.5}, {"ls_init_value": 0.5}, False),
    "bidirectional, last token": ({}, {"no_causal_mask": True, "pool_type": "last"}, False),
}


def both(vision: dict[str, Any], text: dict[str, Any], quick_gelu: bool) -> tuple[Any, CLIPConfig]:
    """open_clip's model with noise added to each weight (biases start at 0, norms at 1), and its configuration."""
    import open_clip
    import torch

    cfg = {"embed_dim": 40, "vision_cfg": VISION | vision, "text_cfg": TEXT | text, "quick_gelu": quick_gelu}
    torch.manual_seed(0)
    model = open_clip.CLIP(**cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, CLIPConfig.from_open_clip(cfg)


def inputs(config: CLIPConfig, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images (B, H, W, 3), and tokens in which zeros follow the end of text, the largest id."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, *config.vision.image_size, 3), np.float32)
    length, end = config.text.context_length, config.text.vocab_size - 1
    tokens = rng.integers(1, end, (batch, length), np.int32)
    for row, last in zip(tokens, rng.permutation(length - 1)[:batch] + 1, strict=True):
        row[last], row[last + 1 :] = end, 0
    return images, tokens


def as_numpy(tensors: Any) -> dict[str, np.ndarray]:
    return {key: value.detach().numpy() for key, value in tensors}


@pytest.mark.parametrize("variant", VARIANTS)
def test_embeddings(variant: str) -> None:
    import torch

    model, config = both(*VARIANTS[variant])
    images, tokens = inputs(config, 5)
    with torch.no_grad():
        theirs = (
            model.encode_image(torch.from_numpy(images).permute(0, 3, 1, 2), normalize=True),
            model.encode_text(torch.from_numpy(tokens).long(), normalize=True),
            model.logit_scale.exp(),
        )
    params = from_open_clip(as_numpy(model.state_dict().items()), config)
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(CLIP(config).apply)({"params": params}, images, tokens)
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(our, their, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_gradients_of_the_contrastive_loss() -> None:
    import torch
    from open_clip.loss import ClipLoss

    model, config = both({}, {}, True)
    images, tokens = inputs(config, 8)
    image, text, scale = model(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(tokens).long())
    their_loss = ClipLoss()(image, text, scale)
    their_loss.backward()
    theirs = from_open_clip(as_numpy((name, tensor.grad) for name, tensor in model.named_parameters()), config)

    def loss(params: dict[str, Any]) -> jax.Array:
        return info_nce(*CLIP(config).apply({"params": params}, images, tokens))

    with jax.default_matmul_precision("highest"):
        our_loss, ours = jax.jit(jax.value_and_grad(loss))(from_open_clip(as_numpy(model.state_dict().items()), config))
    np.testing.assert_allclose(our_loss, their_loss.item(), rtol=1e-6)
    largest = max(abs(leaf).max() for leaf in jax.tree.leaves(theirs))
    for path, their in jax.tree.leaves_with_path(theirs):
        our = ours
        for key in path:
            our = our[key.key]
        error = abs(our - their).max() / max(abs(their).max(), 1e-3 * largest)
        assert error <= 1e-4, (jax.tree_util.keystr(path), error)
