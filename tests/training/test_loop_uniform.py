"""A run whose weights have 4, 8 and fewer than 2 bits: trained, checkpointed, packed, loaded and trained on."""

from __future__ import annotations

import json
import pathlib

import ml_collections
import numpy as np
import pytest

from tclip_jax.artifacts import pack_params, read_artifact
from tclip_jax.artifacts.pack import flatten
from tclip_jax.cli import main
from tclip_jax.inference.load import load_run
from tclip_jax.inference.model import Model
from tclip_jax.models.ternary_rules import ATTENTION, MLP, TOKEN_EMBEDDING
from tclip_jax.runs.config import run_config
from tclip_jax.ternary import TernaryTensor, UniformTensor
from tclip_jax.training import loop
from tclip_jax.training.start import initial_weights

MIXTURE = [
    (TOKEN_EMBEDDING, {"kind": "uniform", "bits": 4}),
    (ATTENTION, {"kind": "uniform", "bits": 8, "group": "channel"}),
    (MLP, {}),
]


@pytest.mark.slow
def test_a_mixture_is_trained_packed_loaded_and_trained_on(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.steps, config.ternary, config.quantizer.group, config.telemetry_every = 3, MIXTURE, 8, 1
    run, packed = str(tmp_path / "run"), str(tmp_path / "packed")
    loop.train(config, run)
    assert main(["pack", run, "--out", packed]) == main(["verify", packed, run]) == 0
    assert "all equal" in capsys.readouterr().out

    artifact = read_artifact(packed)
    leaves = flatten(artifact.params)
    kinds = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, TernaryTensor | UniformTensor)}
    bits = {path.split("/")[-2]: getattr(leaf, "bits", None) for path, leaf in kinds.items()}
    assert bits == {"token_embedding": 4, "qkv": 8, "out": 8, "fc1": None, "fc2": None}

    trained, model = load_run(run)[1], Model.load(packed, activations="A32")
    pixels = np.random.default_rng(0).standard_normal((3, 16, 16, 3)).astype(np.float32)
    for encode, inputs in (("encode_image", pixels), ("encode_text", ["a photo of a 1", "2"])):
        ours, theirs = (getattr(each, encode)(inputs) for each in (model, trained))
        np.testing.assert_allclose(ours, theirs, atol=2e-3)  # the rest is float16
    exact = Model(trained.config, trained.preprocess, pack_params(trained.params, trained.rules))
    exact = exact.repacked(activations="A32")
    np.testing.assert_allclose(exact.encode_image(pixels), trained.encode_image(pixels), atol=2e-6)
    with pytest.raises(ValueError, match="text/token_embedding/embedding is not ternary: it has integers of 4 bits"):
        model.trits("text/token_embedding/embedding")

    config.init, config.init_scales = packed, "recompute"
    again = flatten(pack_params(initial_weights(run_config(config)), run_config(config).rules))
    for path in ("text/token_embedding/embedding", "image/blocks/attention/qkv/kernel"):
        np.testing.assert_array_equal(again[path].integers, leaves[path].integers)
        np.testing.assert_array_equal(again[path].dequantize(), leaves[path].dequantize())

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = {path for line in lines for path in line.get("trits", {})}
    assert measured == {f"{tower}/blocks/mlp/{name}/kernel" for tower in ("image", "text") for name in ("fc1", "fc2")}


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_all_weights_with_few_bits_learn(config: ml_collections.ConfigDict, tmp_path: pathlib.Path, bits: int) -> None:
    config.steps, config.ternary, config.telemetry_every = 30, "Q-ALL", 0
    config.quantizer.update({"kind": "uniform", "bits": bits, "group": 8})
    config.optimizer.learning_rate, config.log_every = 3e-3, 1
    loop.train(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
