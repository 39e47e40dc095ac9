from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import zstandard
from etils import epath

from tclip_jax import storage
from tclip_jax.artifacts import ArtifactError, format, read_artifact, write_artifact
from tclip_jax.artifacts.pack import flatten
from tclip_jax.data.images import Preprocess
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TernaryRules
from tclip_jax.ternary import TernaryTensor
from tests.object_store import Bucket, Failure

Tree = dict[str, Any]
Forge = Callable[..., pathlib.Path]

FC1 = "image/blocks/mlp/fc1/kernel"


@pytest.fixture
def model(config: CLIPConfig, preprocess: Preprocess, packed: Tree, rules: TernaryRules) -> Tree:
    """The arguments that describe the model to `write_artifact`."""
    return {"config": config, "preprocess": preprocess, "params": packed, "rules": rules}


@pytest.mark.parametrize("rest_dtype", ["float16", "float32"])
def test_round_trip_is_exact(model: Tree, tmp_path: pathlib.Path, rest_dtype: Any) -> None:
    write_artifact(tmp_path / "a", **model, rest_dtype=rest_dtype, figures={"top1": 0.5}, provenance={"run": "x"})
    loaded = read_artifact(tmp_path / "a")
    assert loaded[:2] + loaded[3:4] == (model["config"], model["preprocess"], model["rules"])
    assert loaded.manifest["figures"] == {"top1": 0.5}
    assert loaded.manifest["provenance"]["run"] == "x"
    expected, leaves = flatten(model["params"]), flatten(loaded.params)
    assert list(leaves) == list(expected)
    for path, leaf in expected.items():
        if isinstance(leaf, TernaryTensor):
            np.testing.assert_array_equal(leaves[path].trits, leaf.trits)
            np.testing.assert_array_equal(leaves[path].scale, leaf.scale)
            assert (leaves[path].group, leaves[path].axis) == (leaf.group, leaf.axis)
        else:
            dtype = "float32" if path == "logit_scale" else rest_dtype
            np.testing.assert_array_equal(leaves[path], leaf.astype(dtype))
            assert leaves[path].dtype == np.float32


def test_scales_take_the_narrowest_exact_type(written: pathlib.Path) -> None:
    dtypes = {path: entry["dtype"] for path, entry in read_artifact(written).manifest["tensors"].items()}
    assert dtypes[FC1] == dtypes["image/blocks/attention/qkv/kernel"] == "float16"
    assert dtypes["text/token_embedding/embedding"] == "float32"  # scale_bits 24


def test_rectangular_images_and_other_options_survive(model: Tree, tmp_path: pathlib.Path, latent: Tree) -> None:
    vision = dataclasses.replace(model["config"].vision, image_size=(16, 8))
    config = dataclasses.replace(model["config"], vision=vision, quick_gelu=True)
    image = {**model["params"]["image"], "position_embedding": np.zeros((3, 24), np.float32)}
    params = {**model["params"], "image": image}
    preprocess = Preprocess((16, 8), resize_mode="longest")
    write_artifact(tmp_path / "a", config=config, preprocess=preprocess, params=params, rules=())
    assert read_artifact(tmp_path / "a")[:2] == (config, preprocess)
    assert not (tmp_path / "a" / "preprocessor_config.json").exists()  # transformers has no "longest"


def test_the_record_of_a_quantizer_lacks_the_bias_that_is_folded_in(model: Tree, tmp_path: pathlib.Path) -> None:
    """Readers of version 1 refuse the key."""
    rules = tuple((pattern, dataclasses.replace(each, dead_zone_bias=0.5)) for pattern, each in model["rules"])
    write_artifact(tmp_path / "a", **model | {"rules": rules})
    manifest = read_artifact(tmp_path / "a").manifest
    assert manifest["format_version"] == 1
    assert {*manifest["ternary"][0][1]} == {"factor", "group", "scale_bits", "kind"}
    assert read_artifact(tmp_path / "a").rules == model["rules"]


def test_equal_arguments_give_equal_bytes(model: Tree, written: pathlib.Path, tmp_path: pathlib.Path) -> None:
    write_artifact(tmp_path / "a", **model, figures={"top1": 0.5})
    for path in written.iterdir():
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()


def test_parameters_of_another_model_are_refused(model: Tree, tmp_path: pathlib.Path) -> None:
    wider = dataclasses.replace(model["config"], embed_dim=9)
    with pytest.raises(ArtifactError, match=r"image/projection/kernel has shape \[24, 8\]: it must be \[24, 9\]"):
        write_artifact(tmp_path / "a", **model | {"config": wider})
    with pytest.raises(ArtifactError, match="tensors does not fit the model: unexpected heads/kernel"):
        write_artifact(tmp_path / "a", **model | {"params": {**model["params"], "heads": {"kernel": np.ones(1)}}})
    with pytest.raises(ArtifactError, match="preprocess_cfg size"):
        write_artifact(tmp_path / "a", **model | {"preprocess": Preprocess(224)})
    assert not (tmp_path / "a").exists()


def test_latent_weights_are_refused(model: Tree, latent: Tree, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ArtifactError, match=r"image/.* holds latent weights, but a rule quantizes it: call"):
        write_artifact(tmp_path / "a", **model | {"params": latent})


def test_what_exists_is_overwritten_only_on_request(model: Tree, artifact: pathlib.Path) -> None:
    with pytest.raises(FileExistsError, match="artifact exists"):
        write_artifact(artifact, **model)
    write_artifact(artifact, **model, figures={"top1": 0.6}, overwrite=True)
    assert read_artifact(artifact).manifest["figures"] == {"top1": 0.6}


def test_what_is_no_artifact_is_never_overwritten(model: Tree, tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"has no tclip\.json, so it is not an artifact"):
        write_artifact(tmp_path, **model, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def _stop(*_: Any) -> bytes:
    raise KeyboardInterrupt


def test_interrupted_writing_leaves_nothing(
    model: Tree, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(format, "dump_manifest", _stop)
    with pytest.raises(KeyboardInterrupt):
        write_artifact(tmp_path / "a", **model)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_overwriting_leaves_the_old_artifact(
    model: Tree, artifact: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(format, "dump_manifest", _stop)
    with pytest.raises(KeyboardInterrupt):
        write_artifact(artifact, **model, overwrite=True)
    assert read_artifact(artifact).manifest["figures"] == {"top1": 0.5}
    assert [path.name for path in artifact.parent.iterdir()] == ["artifact"]


@pytest.mark.parametrize("local", [True, False])
def test_killed_writing_leaves_no_artifact(
    model: Tree, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    monkeypatch.setattr(storage, "is_local", lambda path: local)
    monkeypatch.setattr(format, "dump_manifest", _stop)
    monkeypatch.setattr(
        type(epath.Path(tmp_path)), "rmtree", lambda *_, **__: None
    )  # a killed process does not clean up
    with pytest.raises(KeyboardInterrupt):
        write_artifact(tmp_path / "a", **model)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("a.tmp-")
    assert (left / "ternary.safetensors").exists()
    with pytest.raises(ArtifactError, match=r"tclip\.json is missing: a complete artifact has it"):
        read_artifact(left)


def test_object_stores_get_the_same_files(model: Tree, written: pathlib.Path, bucket: type[Bucket]) -> None:
    folder = epath.Path("gs://bucket/a")
    write_artifact(folder, **model, figures={"top1": 0.5})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in written.iterdir()
    }


@pytest.mark.parametrize("operation", ["open", "write", "close", "copy"])
def test_a_failed_upload_leaves_the_older_artifact(model: Tree, bucket: type[Bucket], operation: str) -> None:
    """Fail at the first, a middle and the last operation of its kind; object stores rename by copying."""
    folder = epath.Path("gs://bucket/a")
    write_artifact(folder, **model, figures={"top1": 0.5})
    bucket.failing = counting = Failure(operation, 10**9)
    write_artifact(folder, **model, figures={"top1": 0.6}, overwrite=True)
    for number in {1, counting.count // 2, counting.count}:
        bucket.failing = Failure(operation, number)
        with pytest.raises(OSError, match="the network is gone"):
            write_artifact(folder, **model, figures={"top1": 0.7}, overwrite=True)
        bucket.failing = lambda operation, path: None
        assert read_artifact(folder).manifest["figures"] == {"top1": 0.6}
        assert [path.name for path in epath.Path("gs://bucket").iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("ternary", lambda arrays: arrays.pop(f"{FC1}.scale"), f"missing {FC1}.scale"),
        ("ternary", lambda arrays: arrays.update(virus=np.ones(3)), "unexpected virus"),
        ("rest", lambda arrays: arrays.pop("logit_scale"), "missing logit_scale"),
    ],
)
def test_missing_and_unexpected_arrays_are_named(
    artifact: pathlib.Path, forge: Forge, file: str, edit: Callable[[Tree], Any], message: str
) -> None:
    path = artifact / f"{file}.safetensors"
    arrays = safetensors.numpy.load(path.read_bytes())
    edit(arrays)
    path.write_bytes(safetensors.numpy.save(arrays))
    with pytest.raises(ArtifactError, match=f"^{path.name} does not fit the model: {message}$"):
        read_artifact(forge(changed=(path.name,)))


def test_a_forged_scale_is_refused(artifact: pathlib.Path, forge: Forge) -> None:
    file = artifact / "ternary.safetensors"
    stored = safetensors.numpy.load(file.read_bytes())
    for scale, message in (
        (np.float16(np.nan), "holds NaN"),
        (np.float16(-1), "is negative"),
        (np.float16(7), "sha256"),
    ):
        planes = np.full((2, 2, 96), scale).view(np.uint8).reshape(-1, 2).T.tobytes()
        stored[f"{FC1}.scale"] = np.frombuffer(zstandard.compress(planes), np.uint8)
        file.write_bytes(safetensors.numpy.save(stored))
        with pytest.raises(ArtifactError, match=f"^{FC1}.*{message}"):
            read_artifact(forge(changed=(file.name,)))


def test_a_newer_version_is_refused(artifact: pathlib.Path) -> None:
    manifest = json.loads((artifact / "tclip.json").read_text())
    (artifact / "tclip.json").write_text(json.dumps(manifest | {"format_version": 3, "tensors": "elsewhere"}))
    with pytest.raises(
        ArtifactError, match="format_version is 3, and this tclip_jax reads 1 to 2: a newer artifact needs"
    ):
        read_artifact(artifact)
