"""Accuracy against bytes: its models, what they weigh, and the comparison at equal bytes."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.accuracy_data import write_tokenizer
from benchmarks.accuracy_frontier import (
    SIZES,
    at_equal_bytes,
    equal_bytes_table,
    frontier_picture,
    points_of,
    points_table,
)
from benchmarks.accuracy_results import sizes_of
from configs.accuracy import CLASSES, END, PAD, UNKNOWN, vocabulary
from tclip_jax.artifacts.pack import flatten, pack_params
from tclip_jax.data.prompts import captions
from tclip_jax.models.clip import CLIP, init_params, param_shapes
from tclip_jax.models.ternary_rules import TERNARIZABLE, find_quantizer
from tclip_jax.recipes import load_recipe, override
from tclip_jax.runs.config import RunConfig, run_config
from tclip_jax.training.tokenizer import run_tokenizer


def run_of(variant: str, tokenizer: pathlib.Path | str = "words") -> RunConfig:
    config = load_recipe(f"accuracy:cifar10_words,{variant},plain")
    return run_config(override(config, [f"data.tokenizer={tokenizer}"]))


def entry(quantizer: str, width: int, seed: int, size: float, accuracy: float) -> dict[str, Any]:
    result = {"accuracy": accuracy, **dict.fromkeys(SIZES.values(), size)}
    return {"variant": f"{quantizer}+x4+w{width}", "width": width, "seed": seed, "result": result}


def test_every_caption_is_made_of_the_vocabulary(tmp_path: pathlib.Path) -> None:
    write_tokenizer(tmp_path / "words")
    write_tokenizer(tmp_path / "words")
    write_tokenizer(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="other: it has the tokenizer of other captions"):
        write_tokenizer(tmp_path / "other")
    tokenizer, words = run_tokenizer(run_of("full", tmp_path / "words")), vocabulary()
    texts = [caption for name in CLASSES for caption in captions(name, "cifar10")]
    ids = tokenizer(texts)
    assert ids.shape == (180, 16) and len(words) == len(set(words)) == ids.max() + 1
    assert not (ids == words.index(UNKNOWN)).any()
    # The id of the end is the largest, as in CLIP's tokenizer, and appears once; only padding follows.
    assert (ids.argmax(axis=1) == (ids != words.index(PAD)).sum(axis=1) - 1).all()
    assert ((ids == words.index(END)).sum(axis=1) == 1).all()
    row = [words[i] for i in ids[texts.index("a photo of the big cat.")]]
    assert row[:8] == ["a", "photo", "of", "the", "big", "cat", ".", END]
    assert words.index(UNKNOWN) in tokenizer(["a zebra"])


@pytest.mark.parametrize(("quantizer", "bits"), [("ternaryclip", 2), ("int4", 4), ("int8", 8)])
def test_edges8_quantizes_all_matrices_and_sizes_count_them(quantizer: str, bits: int) -> None:
    run = run_of(f"{quantizer}+edges8+x4+w48")
    assert run.model.embed_dim == run.model.vision.width == run.model.text.width == 48
    paths = [path for path in flatten(param_shapes(run.model, ())) if path in TERNARIZABLE]
    found = {path: find_quantizer(path, run.rules) for path in paths}
    edges = {"image/patch_embedding/kernel", "image/projection/kernel", "text/projection/kernel"}
    assert all(found.values()) and edges <= found.keys()
    assert {(found[path].kind, found[path].bits) for path in edges} == {("uniform", 8)}
    params = init_params(CLIP(run.model, run.rules), jax.random.key(0))
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    sizes = sizes_of(pack_params(params, run.rules))
    floats = 2 * sum(leaf.size for path, leaf in leaves.items() if path not in TERNARIZABLE)
    blocks = sum(leaf.size for path, leaf in leaves.items() if path in TERNARIZABLE and path not in edges)
    weights = sum(leaves[path].size for path in edges) + blocks * bits / 8
    # In memory scales and the padding of tiles come on top; an artifact is compressed.
    assert floats + weights <= sizes["resident bytes"] <= 1.3 * (floats + weights)
    assert 0.75 * (floats + weights) < sizes["bytes"] < sizes["resident bytes"]
    for kind in ("bytes", "resident bytes"):
        embedding = sizes[kind] - sizes[f"{kind} without embedding"]
        assert 29 * 48 * bits / 8 * 0.75 < embedding < 29 * 48 * bits / 8 * 1.5 + 100


def test_full_precision_has_two_bytes_for_each_parameter_in_memory() -> None:
    run = run_of("full+w24")
    params = init_params(CLIP(run.model, run.rules), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sizes_of(pack_params(params, run.rules))["resident bytes"] == 2 * count


def test_ternary_is_compared_seed_by_seed_at_equal_bytes() -> None:
    entries = [
        *(entry("full", 16, seed, 100, value) for seed, value in ((0, 0.30), (1, 0.32))),
        *(entry("full", 32, seed, 400, value) for seed, value in ((0, 0.50), (1, 0.48))),
        *(entry("int4", 16, seed, 150, 0.4) for seed in (0, 1)),
        *(entry("int4", 32, seed, 190, 0.5) for seed in (0, 1)),
        *(entry("ternaryclip", 48, seed, 200, value) for seed, value in ((0, 0.45), (1, 0.46), (2, 0.9))),
        {"variant": "ternaryclip+x4", "width": 64, "seed": 0, "result": {"failed": "step 3: loss is nan"}},
        entry("twn", 48, 0, 200, 0.7),
    ]
    points = points_of(entries)
    assert [(point.precision, point.width) for point in points] == [
        ("float16", 16), ("float16", 32), ("int4", 16), ("int4", 32), ("ternary", 48), ("ternary", 64)
    ]  # fmt: skip
    ((ours, differences),) = at_equal_bytes(points, "whole file")
    # 200 is half way from 100 to 400 in the logarithm; int4 has no model as large.
    assert ours.width == 48 and list(differences) == ["float16"]
    np.testing.assert_allclose(differences["float16"], [0.45 - 0.40, 0.46 - 0.40])
    row = equal_bytes_table(points).splitlines()[2]
    assert row == "| towers, on disk | 0.2 | 48 | **+5.50 ± 6.35** |  |  |"
    rows = points_table(points).splitlines()
    assert rows[2] == "| float16 | 16 | 2 | 31.00 ± 12.71 | 0.1 | 0.1 | 0.1 |"
    assert rows[-1] == "| ternary | 64 | 0 (1 failed) |  |  |  |  |"
    assert len(frontier_picture(points).axes) == 2


def test_two_rates_of_one_width_are_an_error() -> None:
    entries = [entry("int4", 32, 0, 100, 0.5), entry("int4", 32, 1, 100, 0.5) | {"variant": "int4+x2+w32"}]
    with pytest.raises(ValueError, match=r"int4\+x4\+w32 and int4\+x2\+w32 are both int4 of width 32"):
        points_of(entries)


def test_a_size_at_an_end_is_compared_with_that_model() -> None:
    entries = [entry("int8", width, 0, size, size / 1000) for width, size in ((16, 100), (32, 200), (48, 300))]
    for size in (100, 200, 300):
        ((_, differences),) = at_equal_bytes(
            points_of([*entries, entry("ternaryclip", 64, 0, size, 0.5)]), "whole file"
        )
        np.testing.assert_allclose(differences["int8"], [0.5 - size / 1000])


def test_the_picture_has_a_line_for_each_precision() -> None:
    entries = [entry(q, w, s, 1e4 * w, 0.5) for q in ("full", "ternaryclip") for w in (16, 32) for s in (0, 1)]
    left, right = frontier_picture(points_of(entries)).axes
    assert [len(axes.containers) for axes in (left, right)] == [4, 4]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["float16", "int8", "int4", "ternary"]
