"""Runs with initial weights have their trits and scales at step 0, and load them only once."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from tclip_jax.artifacts import pack_params, read_artifact, write_artifact
from tclip_jax.artifacts.pack import flatten
from tclip_jax.inference.load import load_run
from tclip_jax.interop.export import export_model
from tclip_jax.interop.importing import import_checkpoint
from tclip_jax.models.clip import param_shapes, with_learned_scales
from tclip_jax.models.inherit import inherit_params
from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.runs.config import RunConfig, run_config
from tclip_jax.runs.record import read_metrics
from tclip_jax.ternary import TernaryTensor
from tclip_jax.training import build, loop
from tclip_jax.training.start import initial_weights, start_params

Params = dict[str, Any]


@pytest.fixture
def run(config: ml_collections.ConfigDict) -> RunConfig:
    config.ternary = "Q-ALL"
    return run_config(config)


@pytest.fixture
def packed(run: RunConfig) -> Params:
    """Random weights, quantized by the rules of the run."""
    rng = np.random.default_rng(0)
    latent = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), param_shapes(run.model))
    return pack_params(latent, run.rules)


def dequantised(tmp_path: pathlib.Path, run: RunConfig, packed: Params) -> pathlib.Path:
    """The floats that open_clip would save."""
    folder = tmp_path / "theirs"
    export_model(folder, config=run.model, preprocess=run.preprocess, params=packed, formats=["open_clip"])
    return folder


def artifact(tmp_path: pathlib.Path, run: RunConfig, params: Params, **changed: Any) -> str:
    fields = {"config": run.model, "preprocess": run.preprocess, "rest_dtype": "float32", "rules": ()} | changed
    write_artifact(tmp_path / "artifact", params=params, **fields)
    return str(tmp_path / "artifact")


def assert_same_weights(latent: Params, rules: Any, expected: Params) -> None:
    """Compares every trit, scale and float."""
    packed, count = flatten(pack_params(latent, rules)), 0
    for path, leaf in flatten(expected).items():
        if isinstance(leaf, TernaryTensor):
            np.testing.assert_array_equal(packed[path].trits, leaf.trits, err_msg=path)
            assert np.asarray(packed[path].scale).tobytes() == np.asarray(leaf.scale).tobytes(), path
            count += 1
        else:
            np.testing.assert_array_equal(packed[path], leaf, err_msg=path)
    assert count == 9


@pytest.mark.slow
def test_training_starts_from_an_import_with_its_trits_and_scales(
    config: ml_collections.ConfigDict,
    run: RunConfig,
    packed: Params,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    imported, workdir = tmp_path / "imported", tmp_path / "run"
    import_checkpoint(dequantised(tmp_path, run, packed), imported)
    assert_same_weights(read_artifact(imported).params, (), packed)
    first: list[Params] = []
    init_state = build.init_state

    def keep(*args: Any, **options: Any) -> Any:
        state = init_state(*args, **options)
        if not isinstance(state.step, jax.core.Tracer):  # a resumed run computes only shapes
            first.append(jax.device_get(state.params["clip"]))
        return state

    monkeypatch.setattr(build, "init_state", keep)
    config.init, config.steps = str(imported), 3
    config.mesh.update({"data": 4, "fsdp": 2})
    loop.train(config, workdir)
    assert_same_weights(first[0], run.rules, packed)
    lines = read_metrics(workdir)
    assert len(lines) == 3 and all(np.isfinite(line["loss"]) for line in lines)
    trained = load_run(workdir)[1].params
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(first[0]), strict=True))

    # A resumed run does not need the initial weights.
    shutil.rmtree(imported)
    config.steps = 4
    trained = loop.train(config, workdir).params
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2, 3, 4]
    config.init = "elsewhere"
    with pytest.raises(ValueError, match=r"this run has config\.init = .*imported, not elsewhere"):
        loop.train(config, workdir)

    # Another run starts from the latent weights of this one.
    config.init, config.ternary = str(workdir), "none"
    jax.tree.map(np.testing.assert_array_equal, initial_weights(run_config(config)), jax.device_get(trained))


@pytest.mark.parametrize("kind", ["artifact", "open_clip"])
def test_trits_of_artifacts_and_of_dequantized_floats(
    kind: str, config: ml_collections.ConfigDict, run: RunConfig, packed: Params, tmp_path: pathlib.Path
) -> None:
    is_artifact = kind == "artifact"
    config.init = artifact(tmp_path, run, packed) if is_artifact else str(dequantised(tmp_path, run, packed))
    weights = initial_weights(run_config(config))
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {np.dtype(np.float32)}
    assert_same_weights(weights, run.rules, packed)


def without_zeros(packed: Params) -> Params:
    """A model with a group without zeros, which the quantizer with k = 2 never gives."""
    leaves, path = flatten(packed), "image/blocks/mlp/fc1/kernel"
    trits = np.array(leaves[path].trits)
    trits[0, :, 3] = np.where(trits[0, :, 3] == 0, 1, trits[0, :, 3])
    return unflatten_dict({**leaves, path: dataclasses.replace(leaves[path], trits=trits)}, sep="/")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"init": "nowhere"}, r"nowhere: no such file or folder"),
        ({"model.quick_gelu": True}, "config.init .*artifact: its model quick_gelu is False, the run's is True"),
        ({"model.vision_cfg.layers": 2}, "its model vision.layers is 1, the run's is 2"),
        (
            {"preprocess.mean": (0.5, 0.5, 0.5)},
            r"its preprocess mean is \(0\.48.*, the run's is \(0\.5, 0\.5, 0\.5\)",
        ),
        (
            {"ternary": "Q-FFN"},
            "attention/out/kernel is ternary, but no rule of the run matches it; make config.ternary",
        ),
        ({"quantizer.group": "tensor"}, "image/blocks/.*: .* weights have another scale than the rest of their group"),
        ({}, "image/blocks/mlp/fc1/kernel: no weights give 0 of its 64 scales and 16 of its 1024 trits with factor 2"),
    ],
)
def test_unsuitable_initial_weights_are_named_and_nothing_is_written(
    changed: dict[str, Any],
    message: str,
    config: ml_collections.ConfigDict,
    run: RunConfig,
    packed: Params,
    tmp_path: pathlib.Path,
) -> None:
    config.init = artifact(tmp_path, run, without_zeros(packed) if not changed else packed)
    with config.unlocked(), config.preprocess.unlocked():
        config.update_from_flattened_dict(changed)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        loop.train(config, tmp_path / "run")
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()


def test_recomputed_scales_start_from_the_dequantized_weights(
    config: ml_collections.ConfigDict, run: RunConfig, packed: Params, tmp_path: pathlib.Path
) -> None:
    packed = without_zeros(packed)
    config.init, config.init_scales = artifact(tmp_path, run, packed), "recompute"
    weights = flatten(initial_weights(run_config(config)))
    for path, leaf in flatten(packed).items():
        expected = leaf.dequantize() if isinstance(leaf, TernaryTensor) else leaf
        np.testing.assert_array_equal(weights[path], expected, err_msg=path)


def test_a_wider_ternary_model_is_cut_to_the_student(
    config: ml_collections.ConfigDict, run: RunConfig, packed: Params, tmp_path: pathlib.Path
) -> None:
    config.inherit = artifact(tmp_path, run, packed)
    config.model.text_cfg.width, config.ternary = 8, [("image/.*/mlp/.*", {"kind": "lsq"})]
    student = run_config(config)
    expected = with_learned_scales(inherit_params(packed, run.model, student.model), student.rules)
    params, origin = start_params(student, make_mesh(4, 2))
    assert origin is not None and origin["source"] == config.inherit
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert "kernel_scale" in params["image"]["blocks"]["mlp"]["fc1"]
    config.inherit = ""
    assert start_params(run_config(config), make_mesh(4, 2)) == (None, None)
