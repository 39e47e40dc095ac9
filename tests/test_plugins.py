"""Plug-ins: a stochastic quantizer, a loss with a head, a source and an augmentation, in arithmetic and in runs."""

from __future__ import annotations

import json
import pathlib
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import tclip_jax
from tclip_jax import plugins, registry
from tclip_jax.artifacts import read_artifact, write_artifact
from tclip_jax.artifacts.pack import pack_params
from tclip_jax.losses.registry import LOSSES, Inputs
from tclip_jax.models.clip import CLIP, param_shapes
from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.recipes import load_recipe, override
from tclip_jax.runs.config import base_config, read_config, run_config
from tclip_jax.runs.record import last_record, read_metrics
from tclip_jax.ternary import Quantizer, fake_quantize, find_levels, group_maxima, initial_alpha, quantize, ternarize
from tclip_jax.training.loop import train
from tests.plugins import own_registries, register_stochastic


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(registry.PLUGINS, "")
    with own_registries():
        yield


W = np.random.default_rng(0).laplace(size=(64, 6)).astype(np.float32)


@pytest.mark.parametrize("group", [16, "channel", "tensor"])
def test_a_threshold_per_weight_makes_trits_of_the_stated_probability(group: Any) -> None:
    register_stochastic()
    quantizer = Quantizer(kind="stochastic", group=group)
    draws = jax.vmap(lambda key: ternarize(W, quantizer, key=key).dequantize())(
        jax.random.split(jax.random.key(0), 4000)
    )
    scale = np.broadcast_to(np.asarray(find_levels(jnp.asarray(W), quantizer).expanded(64, -2)[0]), W.shape)
    inside = np.abs(W) <= scale  # beyond, the probability is 1
    mean, error = np.mean(draws, 0), scale / np.sqrt(4000)
    assert np.all(np.abs(mean - np.where(inside, W, np.copysign(scale, W))) < 5 * error)
    assert set(np.unique(np.asarray(draws) / scale).round(6)) <= {-1.0, 0.0, 1.0}


def test_without_a_key_it_is_deterministic_and_equals_half_the_scale() -> None:
    register_stochastic()
    plain, factor = (ternarize(jnp.asarray(W), Quantizer(kind=kind, group=16)) for kind in ("stochastic", "factor"))
    np.testing.assert_array_equal(plain.trits, factor.trits)
    np.testing.assert_array_equal(plain.scale, factor.scale)


@pytest.mark.parametrize("key", [None, jax.random.key(3)])
def test_fake_quantize_equals_ternarize_and_has_the_plug_ins_gradient(key: Any) -> None:
    register_stochastic()
    quantizer = Quantizer(kind="stochastic", group=16, options={"clip": 0.5})
    value, pull = jax.vjp(lambda w: fake_quantize(w, quantizer, key=key), jnp.asarray(W))
    np.testing.assert_array_equal(value, ternarize(jnp.asarray(W), quantizer, key=key).dequantize())
    scale, _ = find_levels(jnp.asarray(W), quantizer, key=key).expanded(64, -2)
    g = np.random.default_rng(1).normal(size=W.shape).astype(np.float32)
    np.testing.assert_array_equal(pull(jnp.asarray(g))[0], np.where(np.abs(W) <= 0.5 * np.asarray(scale), g, 0))


def test_shards_draw_the_same_numbers_as_one_device() -> None:
    register_stochastic()
    quantizer, mesh, key = Quantizer(kind="stochastic", group=16), make_mesh(1, 8), jax.random.key(1)
    draw = jax.jit(lambda w: fake_quantize(w, quantizer, key=key))
    w = jnp.asarray(np.concatenate([W, W[:, :2]], axis=1))
    for spec in (P("fsdp", None), P(None, "fsdp")):
        np.testing.assert_array_equal(draw(jax.device_put(w, jax.NamedSharding(mesh, spec))), draw(w))


@pytest.mark.slow
def test_every_layer_draws_its_own_numbers_and_every_call_with_a_key_the_same() -> None:
    register_stochastic()
    run = run_config(override(load_recipe("quickstart:student"), ["teacher=any", "quantizer.kind=stochastic"]))
    model, rng = CLIP(run.model, run.rules), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), param_shapes(run.model))
    blocks = params["image"]["blocks"]["mlp"]["fc1"]["kernel"]
    blocks[:] = blocks[:1]  # equal weights in all layers
    pixels, tokens = (
        rng.normal(size=(2, 32, 32, 3)).astype(np.float32),
        np.tile(np.r_[49406, 5, 49407, [0] * 13], (2, 1)),
    )

    def embed(params: Any, key: jax.Array) -> jax.Array:
        return model.apply({"params": params}, pixels, tokens, rngs={"quantizer": key})[0]

    first, again, other = (jax.jit(embed)(params, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.asarray(first - other)).max() > 1e-3
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(embed(params, jax.random.key(0))[:, 0])))(params)
    kernel = np.asarray(gradient["image"]["blocks"]["mlp"]["fc1"]["kernel"])
    assert np.isfinite(kernel).all() and len({layer.tobytes() for layer in kernel}) == len(kernel)


@pytest.mark.slow
def test_a_run_with_noise_resumes_bit_for_bit_in_microbatches_too(tmp_path: pathlib.Path) -> None:
    register_stochastic()
    changes = ["ternary=Q-ALL", "quantizer.kind=stochastic", "steps=4", "log_every=1", "eval.source="]

    def losses(name: str, *more: str) -> list[float]:
        config = override(load_recipe("quickstart:teacher,runlocal"), [*changes, "checkpoint.every=2", *more])
        train(config, tmp_path / name)
        return [line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line]

    whole = losses("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "4")
    assert losses("resumed") == whole
    np.testing.assert_allclose(losses("parts", "data.microbatches=2"), whole, rtol=1e-5)
    assert last_record(tmp_path / "whole")["plugins"]["quantizer stochastic"]["file"] == "plugins.py"


def test_wrong_shapes_and_missing_gradients_are_named() -> None:
    @plugins.quantizer("flat")
    def flat(w: jax.Array, quantizer: Quantizer, axis: int) -> Any:
        return jnp.ones((1, 1)), None

    with pytest.raises(
        ValueError, match=r"quantizer flat gives scales \(1, 1\) and thresholds None for a weight \(64, 6\)"
    ):
        ternarize(jnp.asarray(W), Quantizer(kind="flat", group=16))
    with pytest.raises(ValueError, match="a learned scale needs a gradient"):
        plugins.quantizer("learned", initial_alpha=lambda w, quantizer, axis: jnp.ones(()))(flat)
    with pytest.raises(ValueError, match="has no learned scale"):
        initial_alpha(jnp.asarray(W), Quantizer(kind="flat"))


def test_a_learned_scale_of_a_plug_in_equals_lsq() -> None:
    from tclip_jax.ternary import QUANTIZERS

    rule = QUANTIZERS["lsq"]
    plugins.quantizer("mine", gradient=rule.gradient, initial_alpha=rule.initial_alpha)(
        lambda w, quantizer, axis, alpha: (alpha, None)
    )
    mine, lsq = Quantizer(kind="mine", group=16), Quantizer(kind="lsq", group=16)
    alpha = initial_alpha(jnp.asarray(W), mine)

    def gradients(quantizer: Quantizer) -> Any:
        _, pull = jax.vjp(lambda w, alpha: fake_quantize(w, quantizer, alpha=alpha), jnp.asarray(W), alpha)
        return pull(jnp.ones_like(W))

    for ours, theirs in zip(gradients(mine), gradients(lsq), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_a_stock_installation_reads_inspects_and_evaluates_the_artifact(tmp_path: pathlib.Path) -> None:
    register_stochastic()
    changes = ["teacher=any", "quantizer.kind=stochastic", "quantizer.options.clip=2"]
    run = run_config(override(load_recipe("quickstart:student"), changes))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), param_shapes(run.model))
    packed = pack_params(params, run.rules)
    write_artifact(tmp_path / "artifact", config=run.model, preprocess=run.preprocess, params=packed, rules=run.rules)
    expected = tclip_jax.load(tmp_path / "artifact").encode_text(["a cat"])
    program = (
        "import sys, numpy as np, tclip_jax\n"
        "from tclip_jax.cli import main\n"
        "from tclip_jax.artifacts import read_artifact\n"
        "assert [q.kind for _, q in read_artifact('artifact').rules][0] == 'stochastic'\n"
        "np.save('text.npy', tclip_jax.load('artifact').encode_text(['a cat']))\n"
        "for words in ('inspect artifact', 'verify artifact artifact', 'export artifact --out pytorch',\n"
        "              'evaluate artifact --data digits --out results'):\n"
        "    assert main(words.split()) in (0, None), words\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "stochastic clip=2 group=256" in ran.stdout
    np.testing.assert_array_equal(np.load(tmp_path / "text.npy"), expected)
    artifact = read_artifact(tmp_path / "artifact")
    assert artifact.manifest["ternary"][0][1]["options"] == {"clip": 2}


@pytest.mark.slow
def test_a_run_without_its_plug_in_names_the_file(tmp_path: pathlib.Path) -> None:
    with own_registries():
        register_stochastic()
        config = override(load_recipe("quickstart:teacher,runlocal"), ["ternary=Q-FFN", "quantizer.kind=stochastic"])
        train(override(config, ["steps=1", "optimizer.warmup_steps=0", "eval.source="]), tmp_path)
        assert read_config(tmp_path).quantizer.kind == "stochastic"
    with pytest.raises(
        ValueError, match=r"needs the quantizer 'stochastic' of the plug-in plugins\.py: add --plugin FILE"
    ):
        read_config(tmp_path)


@pytest.mark.slow
def test_a_loss_with_a_learned_head(tmp_path: pathlib.Path) -> None:
    @plugins.loss("centre", "distance to a learned centre", init_head=lambda key, width, _: jnp.zeros(width))
    def centre(x: Inputs) -> jax.Array:
        return jnp.mean(jnp.sum((x.student[0] - x.heads["centre"]) ** 2, -1))

    config = override(load_recipe("quickstart:teacher,runlocal"), ["loss.centre=2.0", "eval.source=", "log_every=1"])
    train(config, tmp_path)
    lines = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert lines[0]["loss/centre"] == pytest.approx(1.0, abs=1e-5)  # the centre starts at 0, embeddings have length 1
    assert all(line["loss"] == pytest.approx(line["loss/task"] + 2 * line["loss/centre"], rel=1e-5) for line in lines)
    assert lines[-1]["loss/centre"] < 1.0  # the centre is learned
    assert json.loads((tmp_path / "config.json").read_text())["loss"]["centre"] == 2.0
    assert run_config(base_config()).loss.weights == {"task": 1.0}


SOURCE = """
import numpy as np
from tclip_jax import plugins
from tclip_jax.data.images import preprocess
from tclip_jax.data.sources import Record

@plugins.source("squares", "squares:<count>")
class Squares:
    classnames = ("dark", "light")

    def __init__(self, argument, split):
        self.count = int(argument)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Record(np.full((8, 8, 3), 255 * (index % 2), np.uint8), (), index % 2, str(index))

@plugins.augmentation("shifted")
def shifted(image, rng, p):
    return preprocess(image, p) // 2 + np.uint8(rng.integers(100))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_workers_read_a_source_and_an_augmentation_of_a_file(tmp_path: pathlib.Path, workers: int) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    registry.load_plugin(str(tmp_path / "mine.py"))
    changes = [
        "data.source=squares:32",
        "data.augment=shifted",
        f"data.workers={workers}",
        "eval.source=",
        "log_every=1",
    ]
    train(override(load_recipe("quickstart:teacher,runlocal"), changes), tmp_path / "run")
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 4 and np.isfinite(losses).all()
    used = last_record(tmp_path / "run")["plugins"]
    assert set(used) == {"augmentation shifted", "source squares"}


def test_processes_that_are_started_check_a_source_of_a_file(tmp_path: pathlib.Path) -> None:
    from tclip_jax.datasets.check import check

    (tmp_path / "mine.py").write_text(SOURCE)
    registry.load_plugin(str(tmp_path / "mine.py"))
    assert check("squares:32", "train", workers=1).samples == 32


def test_kinds_are_hashable_and_survive_pickling() -> None:
    quantizer = Quantizer(kind="stochastic", options={"clip": 2.0})
    assert pickle.loads(pickle.dumps(quantizer)) == quantizer and hash(quantizer) == hash(
        Quantizer(kind="stochastic", options=(("clip", 2.0),))
    )


def test_plug_ins_that_return_something_else_are_named(tmp_path: pathlib.Path) -> None:
    plugins.quantizer("one")(lambda w, quantizer, axis: jnp.ones(3))
    with pytest.raises(
        ValueError, match=r"test_plugins\.py: the quantizer one: .* it must be \(w, quantizer, axis\) -> "
    ):
        ternarize(jnp.asarray(W), Quantizer(kind="one"))
    plugins.loss("rows", "an array")(lambda x: x.student[0])
    config = override(load_recipe("quickstart:teacher,runlocal"), ["loss.rows=1.0", "eval.source="])
    with pytest.raises(ValueError, match=r"the loss rows returns an array \(16, 96\): it must be a scalar"):
        train(config, tmp_path / "loss")
    assert not (tmp_path / "loss").exists()
    plugins.loss("layers", "the name of an option")(lambda x: 0.0)
    with pytest.raises(
        ValueError, match="the loss 'layers' of a plug-in has the name of an option or a head: rename it"
    ):
        base_config()
    LOSSES._entries.pop("layers")
    plugins.augmentation("small")(lambda image, rng, p: np.zeros((3, 3, 3), np.uint8))
    config = override(load_recipe("quickstart:teacher,runlocal"), ["data.augment=small", "eval.source="])
    with pytest.raises(
        ValueError, match=r"the augmentation small gives uint8 \(3, 3, 3\): it must give uint8 \(32, 32, 3\)"
    ):
        train(config, tmp_path / "augmentation")
    assert not (tmp_path / "augmentation").exists()


def test_a_uniform_kind_of_a_plug_in_clips_at_its_largest_integer() -> None:
    @plugins.quantizer("halved", uniform=True)
    def halved(w: jax.Array, quantizer: Quantizer, axis: int) -> Any:
        return group_maxima(jnp.abs(w), quantizer, axis) / 14, None

    quantizer = Quantizer(kind="halved", bits=4, group=16)
    packed = quantize(jnp.asarray(W), quantizer)
    scale = np.repeat(np.asarray(packed.scale), 16, 0)
    np.testing.assert_array_equal(packed.integers, np.clip(np.round(W / scale), -7, 7))
    np.testing.assert_array_equal(packed.dequantize(), fake_quantize(jnp.asarray(W), quantizer))
    plugins.quantizer("both", uniform=True)(lambda w, quantizer, axis: (halved(w, quantizer, axis)[0],) * 2)
    with pytest.raises(ValueError, match="the quantizer both is uniform and gives thresholds: they must be None"):
        quantize(jnp.asarray(W), Quantizer(kind="both"))
