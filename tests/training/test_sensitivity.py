"""The rises of the loss are differences of independent losses, and the proposed rules keep their budget."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from PIL import Image

from tclip_jax.artifacts.pack import flatten, pack_params
from tclip_jax.cli import main
from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.models.presets import model_cfg
from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.runs.config import EvalConfig, RunConfig, base_config, run_config
from tclip_jax.ternary import QuantizedTensor, Quantizer
from tclip_jax.training import loop, sensitivity
from tclip_jax.training.sensitivity import (
    ALL,
    FLOAT,
    FOUR_BITS,
    TERNARY,
    Part,
    Row,
    Sensitivity,
    float_run,
    measure,
    parts_of,
    propose_rules,
    validation_loss,
)
from tests.plugins import own_registries, register_stochastic

PAIRS = 12
FC1 = "image/blocks/mlp/fc1/kernel"


def write_pairs(folder: pathlib.Path) -> str:
    rng = np.random.default_rng(0)
    rows = ["path,caption"]
    for i in range(PAIRS):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,picture {i}")
    (folder / "pairs.csv").write_text("\n".join(rows))
    return f"csv:{folder}/pairs.csv"


def pseudo_loss(params: Any) -> float:
    """A smooth function of all weights, which tells them apart."""
    leaves = [np.float64(leaf).reshape(-1) for leaf in jax.tree.leaves(params)]
    return float(sum(np.sum(np.sin(np.arange(len(leaf)) + 50 * leaf)) / len(leaf) for leaf in leaves))


def dequantized(params: Any, rules: Any) -> dict[str, Any]:
    """All leaves, packed and then as floats."""
    packed, shapes = flatten(pack_params(params, rules)), flatten(params)
    return {
        path: leaf.dequantize().reshape(shapes[path].shape) if isinstance(leaf, QuantizedTensor) else leaf
        for path, leaf in packed.items()
    }


@pytest.fixture(scope="module")
def shape() -> tuple[RunConfig, Any]:
    config = base_config()
    config.model = model_cfg("tiny")
    config.model.vision_cfg.update({"layers": 2, "width": 32, "head_width": 16})
    config.model.text_cfg.update({"layers": 1, "width": 32, "heads": 2, "vocab_size": 49408})
    config.quantizer.group = 16
    config.ternary = [("image/.*", {"group": 8}), (".*/out/kernel", {"kind": "lsq"})]
    run = run_config(config)
    return run, init_params(CLIP(run.model, run.rules), jax.random.key(0))


@pytest.mark.parametrize("by", ["parameter", "matrix", "block"])
def test_every_rise_is_that_of_the_packed_part_alone(shape: tuple[RunConfig, Any], by: str) -> None:
    run, params = shape
    measured = measure(run, params, pseudo_loss, by)
    leaves = flatten(params)
    everything = (("image/.*", run.rules[0][1]), run.rules[1], (".*", run.quantizer))
    uniform = ((".*", Quantizer(kind="uniform", bits=4, group=16)),)
    packed = {TERNARY: dequantized(params, everything), FOUR_BITS: dequantized(params, uniform)}
    assert measured.float_loss == pseudo_loss(params)
    counts = {"parameter": 12, "matrix": 16, "block": 7}
    assert len(measured.rows) == counts[by] + 1 and measured.rows[-1].part.name == ALL
    for row in measured.rows:
        for precision, floats in packed.items():
            changed = {path: np.array(leaf) for path, leaf in leaves.items()}
            for path, layer in row.part.places:
                index = ... if layer is None else layer
                changed[path][index] = np.asarray(floats[path])[index]
            assert row.rises[precision] == pytest.approx(pseudo_loss(changed) - measured.float_loss, abs=1e-9)
    rises = [row.rises[TERNARY] for row in measured.rows[:-1]]
    assert rises == sorted(rises, reverse=True)
    covered = [place for row in measured.rows[:-1] for place in row.part.places]
    assert sorted(covered, key=str) == sorted(measured.rows[-1].part.places, key=str) and len({*covered}) == len(
        covered
    )


def test_bits_count_integers_and_scales(shape: tuple[RunConfig, Any]) -> None:
    run, params = shape
    parts = {part.name: part for part in parts_of(run, params, "matrix")}
    assert parts[f"{FC1}[1]"].bits == pytest.approx({TERNARY: 1.6 + 16 / 8, FOUR_BITS: 4 + 16 / 16})
    assert parts[f"{FC1}[1]"].weights == 32 * 128
    embedding = parts["text/token_embedding/embedding"]
    assert embedding.bits[TERNARY] == pytest.approx(1.6 + 16 / 16) and embedding.places == ((embedding.name, None),)


def rows(*figures: tuple[int, float, float]) -> Sensitivity:
    """Parts p0, p1, … of so many weights, with their rises as trits of 2 bits and as integers of 4."""
    bits = {TERNARY: 2.0, FOUR_BITS: 4.0}
    each = [
        Row(Part(f"image/{'abcdef'[i]}", (), count, bits), {TERNARY: trits, FOUR_BITS: four})
        for i, (count, trits, four) in enumerate(figures)
    ]
    whole = Part(ALL, (), sum(count for count, *_ in figures), bits)
    return Sensitivity(1.0, [*each, Row(whole, {TERNARY: 8.0, FOUR_BITS: 4.0})])


def proposed(run: RunConfig, measured: Sensitivity, bits: float) -> tuple[dict[str, str], float]:
    """The precision of each part, and the bits used."""
    rules, used = propose_rules(run, measured, bits)
    kinds = {pattern: FOUR_BITS if changes.get("kind") == "uniform" else TERNARY for pattern, changes in rules}
    return {row.part.name: kinds.get(row.part.name, FLOAT) for row in measured.rows[:-1]}, used


@pytest.mark.parametrize("bits", [2.0, 2.5, 3.0, 4.0, 9.0, 16.0])
def test_the_budget_is_kept_and_counts_what_was_chosen(shape: tuple[RunConfig, Any], bits: float) -> None:
    measured = rows((100, 0.5, 0.1), (10, 0.2, 0.01), (10, -0.1, 0.0), (40, 0.1, 0.1))
    chosen, used = proposed(shape[0], measured, bits)
    sizes = {row.part.name: row.part.weights for row in measured.rows[:-1]}
    each = {TERNARY: 2, FOUR_BITS: 4, FLOAT: 16}
    assert used == pytest.approx(sum(sizes[name] * each[kind] for name, kind in chosen.items()) / 160)
    assert used <= bits and chosen["image/c"] == TERNARY  # ternary does not cost it anything
    assert chosen["image/d"] != FOUR_BITS  # which would not help it


def test_what_lowers_the_loss_most_for_each_bit_comes_first(shape: tuple[RunConfig, Any]) -> None:
    run, _ = shape
    measured = rows((8, 0.3, 0.0), (8, 0.1, 0.0), (8, 0.7, 0.0), (8, 0.05, 0.0))
    for bits, kept in ((2.5, "c"), (3.0, "ca"), (3.5, "cab"), (4.0, "cabd")):
        chosen, used = proposed(run, measured, bits)
        assert {name[-1] for name, kind in chosen.items() if kind == FOUR_BITS} == {*kept} and used == bits
    with pytest.raises(ValueError, match=r"--bits 1.9 is below 2.00, the bits of a weight if all are ternary"):
        propose_rules(run, measured, 1.9)
    rules, _ = propose_rules(run, measured, 2.5)
    assert rules == [
        ("image/a", {"group": 8}), ("image/b", {"group": 8}),
        ("image/c", {"kind": "uniform", "bits": 4}), ("image/d", {"group": 8}),
    ]  # fmt: skip


@pytest.mark.slow
def test_the_validation_loss_of_floats_is_that_of_the_model_and_of_few_pairs(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path
) -> None:
    """The whole model as dequantized floats has the loss of the ternary model, compiled on its own and packed."""
    source = write_pairs(tmp_path)
    config.ternary, config.model.vision_cfg.patch_bias = [(".*", {})], True
    config.quantizer.update({"group": 8, "dead_zone_bias": 0.5})
    run, mesh = run_config(config), make_mesh(devices=jax.devices()[:1])
    params = init_params(CLIP(run.model, run.rules), jax.random.key(0))
    how = EvalConfig("loss", source, split="train", batch_size=5)
    floats, ternary = (validation_loss(each, mesh, how, pairs=10) for each in (float_run(run), run))
    made = measure(run, params, floats).rows
    packed = floats(unflatten_dict(dequantized(params, run.rules), sep="/"))
    assert packed == pytest.approx(ternary(params), rel=1e-5)
    assert made[-1].part.name == ALL and floats(params) + made[-1].rises[TERNARY] == pytest.approx(packed, rel=1e-6)
    everything = validation_loss(float_run(run), mesh, how)
    assert everything(params) != floats(params)
    alone = dataclasses.replace(run, ternary=((FC1, {}),))
    row = next(row for row in made if row.part.name == FC1)
    expected = validation_loss(alone, mesh, how, pairs=10)(params)
    assert floats(params) + row.rises[TERNARY] == pytest.approx(expected, rel=1e-5)


def quantizers_of(config: ml_collections.ConfigDict) -> dict[str, Quantizer]:
    """The quantizers of four weights by the rules proposed for 3 bits, where 4 bits help only the third of them."""
    names = [f"image/blocks/{layer}/kernel" for layer in ("mlp/fc1", "mlp/fc2", "attention/out", "attention/qkv")]
    each = [
        Row(
            Part(name, (), 8, {TERNARY: 2.0, FOUR_BITS: 4.0}),
            {TERNARY: 0.1, FOUR_BITS: 0.0 if name == names[2] else 0.1},
        )
        for name in names
    ]
    rules, _ = propose_rules(run_config(config), Sensitivity(1.0, each), 3.0)
    config.ternary = json.loads(json.dumps(rules))
    made = run_config(config).rules
    return {name: next(quantizer for pattern, quantizer in made if re.fullmatch(pattern, name)) for name in names}


def test_proposed_rules_give_the_quantizers_that_were_measured() -> None:
    """Also those with the default of a key that `config.quantizer` changes."""
    config = base_config()
    config.quantizer.update({"group": 16, "scale_bits": 11, "dead_zone_bias": 0.5})
    config.ternary = [(".*/fc1/kernel", {"dead_zone_bias": 0.0}), (".*/fc2/kernel", {"scale_bits": 8}), (".*", {})]
    assert [*quantizers_of(config).values()] == [
        Quantizer(group=16, scale_bits=11),
        Quantizer(group=16, dead_zone_bias=0.5),
        Quantizer(group=16, scale_bits=11, kind="uniform", bits=4),
        Quantizer(group=16, scale_bits=11, dead_zone_bias=0.5),
    ]


def test_proposed_rules_reset_the_options_of_a_plug_in() -> None:
    with own_registries():
        register_stochastic()
        config, options = base_config(), {"clip": 2.0}
        config.quantizer.update({"kind": "stochastic", "options": options, "group": 16})
        config.ternary = [
            (".*/fc1/kernel", {"options": {}}),
            (".*/fc2/kernel", {"kind": "factor", "options": {}}),
            (".*", {}),
        ]
        assert [*quantizers_of(config).values()] == [
            Quantizer(group=16, kind="stochastic"),
            Quantizer(group=16),
            Quantizer(group=16, kind="uniform", bits=4),
            Quantizer(group=16, kind="stochastic", options=options),
        ]


def test_what_the_command_cannot_use_is_refused_before_it_reads_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--split", "train"], "--split is of --data: name its source too"),
        (["--templates", "cifar10"], "--templates is of --data: name its source too"),
        (["--data", "digits", "--plot", "plot.doc"], "--plot plot.doc: no plot has the suffix .doc: there are "),
    ):
        assert main(["sensitivity", "missing", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_prints_a_table_rules_and_json_and_draws(
    config: ml_collections.ConfigDict,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config.steps, source, run = 1, write_pairs(tmp_path), str(tmp_path / "run")
    config.eval.source = ""
    loop.train(config, run)
    call = ["sensitivity", run, "--data", source, "--split", "train", "--batch-size", "6"]
    assert main([*call, "--bits", "4", "--plot", str(tmp_path / "plot.svg")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "part" and lines[0].endswith("rise, 4 bits")
    assert lines[-1].startswith("--config.ternary=[('") and "<svg" in (tmp_path / "plot.svg").read_text()
    rules = lines[-1].partition("=")[2]
    assert main([*call, "--json", "--by", "block"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["proposed"] is None and report["rows"][-1]["name"] == ALL
    assert {row["name"] for row in report["rows"]} >= {"image/blocks[0]", "text/blocks[0]"}
    assert main(["params", "--config", "quickstart:student", f"--config.ternary={rules}"]) == 0
    capsys.readouterr()
    assert main([*call, "--bits", "4", "--by", "matrix"]) == 2
    assert "--bits proposes rules, which select whole parameters" in capsys.readouterr().err
    monkeypatch.setattr(sensitivity, "measure", None)  # refused before any evaluation
    assert main([*call, "--bits", "1.5"]) == 2
    assert "--bits 1.5 is below 2." in capsys.readouterr().err
    assert main(["sensitivity", run]) == 2
    assert "--data is missing" in capsys.readouterr().err
