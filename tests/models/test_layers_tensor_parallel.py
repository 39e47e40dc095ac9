"""The models that devices along the mesh axis `tensor` can share."""

from __future__ import annotations

from typing import Any

import pytest

from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.layers import check_tensor
from tclip_jax.models.presets import model_cfg
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.runs.config import base_config, run_config
from tclip_jax.ternary import Quantizer

B16, L14 = (CLIPConfig.from_open_clip(model_cfg(name)) for name in ("ViT-B-16", "ViT-L-14"))


@pytest.mark.parametrize(
    ("config", "which", "group", "tensor"),
    [
        (B16, "none", 256, 4),
        (B16, "Q-FFN", 256, 4),  # 3072 / 4 and 2048 / 4 are whole groups
        (B16, "Q-ALL", 128, 2),  # 768 / 2 and 512 / 2 are whole groups
        (B16, "Q-ALL", "channel", 1),
        (L14, "Q-ALL", 64, 4),
    ],
)
def test_models_that_can_be_shared(config: CLIPConfig, which: str, group: Any, tensor: int) -> None:
    check_tensor(config, ternary_rules(which, Quantizer(group=group)), tensor)


@pytest.mark.parametrize(
    ("which", "group", "tensor", "message"),
    [
        ("none", 256, 8, "mesh tensor=8 does not divide the 12 heads of the image tower"),
        ("none", 256, 3, "mesh tensor=3 does not divide the 8 heads of the text tower"),
        (
            "Q-ALL",
            256,
            2,
            "image/blocks/attention/out/kernel: 768 inputs over mesh tensor=2 are 384 on a device, "
            "not a multiple of its quantizer's group 256",
        ),
        (
            "Q-FFN",
            "channel",
            4,
            "image/blocks/mlp/fc2/kernel: 3072 inputs over mesh tensor=4 are 768 on a device, "
            "not a multiple of its quantizer's group 3072",
        ),
    ],
)
def test_models_that_cannot_name_both_numbers(which: str, group: Any, tensor: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_tensor(B16, ternary_rules(which, Quantizer(group=group)), tensor)
    config = base_config()
    config.model, config.ternary, config.quantizer.group, config.mesh.tensor = (
        model_cfg("ViT-B-16"),
        which,
        group,
        tensor,
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        run_config(config)
