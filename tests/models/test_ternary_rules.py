"""Selection of the ternary parameters: the published shares, and the parameters that a rule can name."""

from __future__ import annotations

import math
import re

import jax
import pytest

from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import model_cfg
from tclip_jax.models.ternary_rules import ATTENTION, MLP, TERNARIZABLE, find_quantizer, input_axis, ternary_rules
from tclip_jax.parallel.sharding import path_of
from tclip_jax.ternary import Quantizer

QUANTIZER = Quantizer(group=64)


@pytest.fixture(scope="module")
def sizes() -> dict[str, int]:
    """Number of parameters of ViT-B-16 by path."""
    leaves = jax.tree_util.tree_leaves_with_path(param_shapes(CLIPConfig.from_open_clip(model_cfg("ViT-B-16"))))
    return {path_of(path): math.prod(leaf.shape) for path, leaf in leaves}


@pytest.mark.parametrize(
    ("which", "share"),
    [
        ("none", 0.0),
        ("Q-FFN", 0.5466),
        ([(MLP, QUANTIZER), (ATTENTION, QUANTIZER)], 0.8200),
        ("Q-ALL", 0.9890),
    ],
)
def test_shares_of_vit_b_16(which: str | list[tuple[str, Quantizer]], share: float, sizes: dict[str, int]) -> None:
    rules = ternary_rules(which, QUANTIZER)
    ternary = sum(size for path, size in sizes.items() if find_quantizer(path, rules) == QUANTIZER)
    assert round(ternary / sum(sizes.values()), 4) == share


def test_q_all_leaves_in_float_what_the_paper_does(sizes: dict[str, int]) -> None:
    rules = ternary_rules("Q-ALL", QUANTIZER)
    matrices = {
        path for path in sizes if find_quantizer(path, rules) is None and path.endswith(("/kernel", "embedding"))
    }
    assert matrices == {
        "image/patch_embedding/kernel",
        "image/class_embedding",
        "image/position_embedding",
        "image/projection/kernel",
        "text/position_embedding",
        "text/projection/kernel",
    }


def test_what_can_be_ternary_is_there_and_is_every_kernel_of_the_blocks(sizes: dict[str, int]) -> None:
    assert {path for path in TERNARIZABLE if "/pool/" not in path} <= set(sizes)
    assert {path for path in sizes if re.search("/blocks/.*/kernel", path)} <= set(TERNARIZABLE)


def test_the_first_rule_that_matches_the_whole_path_decides() -> None:
    first, second = Quantizer(1.0), Quantizer(2.0)
    rules = ternary_rules([("image/.*/fc1/kernel", first), (".*", second)], QUANTIZER)
    assert rules == (("image/.*/fc1/kernel", first), (".*", second))
    assert find_quantizer("image/blocks/mlp/fc1/kernel", rules) is first
    assert find_quantizer("text/blocks/mlp/fc1/kernel", rules) is second
    assert find_quantizer("image/blocks/mlp/fc1/kernel", (("mlp/fc1/kernel", first),)) is None


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("Q-all", r"^no ternary set 'Q-all': there are none, Q-FFN, Q-ALL, or a list of \(regex, quantizer\)$"),
        ([("image/(", QUANTIZER)], r"^ternary rule 'image/\(' is not a regular expression: "),
        (
            [("image/.*", QUANTIZER), ("vision/.*", QUANTIZER)],
            "^ternary rule 'vision/.*' matches none of text/token_emb",
        ),
        (
            [("image/class_embedding", QUANTIZER)],
            "^ternary rule 'image/class_embedding' matches none of ",
        ),
    ],
)
def test_a_rule_that_can_do_nothing_is_refused(which: str | list[tuple[str, Quantizer]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ternary_rules(which, QUANTIZER)


def test_groups_run_down_a_kernel_and_along_the_rows_of_a_table() -> None:
    assert input_axis("image/blocks/mlp/fc1/kernel") == -2
    assert input_axis("text/token_embedding/embedding") == -1
