"""Artifacts with trits and integers of 4 and 8 bits: written, read, verified, inspected, forged."""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from flax.traverse_util import unflatten_dict

from tclip_jax.artifacts import ArtifactError, read_artifact, verify_artifact
from tclip_jax.artifacts.files import file_entry
from tclip_jax.artifacts.inspection import inspect_artifact, inspection_text, plot_inspection
from tclip_jax.artifacts.manifest import MANIFEST, dump_manifest
from tclip_jax.artifacts.pack import flatten, repack_params
from tclip_jax.cli import main
from tclip_jax.inference.model import Model
from tclip_jax.models.ternary_rules import PATCH_EMBEDDING, TOKEN_EMBEDDING, TernaryRules
from tclip_jax.ternary import TernaryTensor, UniformTensor

Tree = dict[str, Any]
QKV = "image/blocks/attention/qkv/kernel"


@pytest.fixture
def copied(mixed_written: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(mixed_written, tmp_path / "mixed"))


def test_it_has_version_2_and_comes_back_to_the_bit(
    mixed_written: pathlib.Path, mixed: Tree, written: pathlib.Path
) -> None:
    versions = [json.loads((each / MANIFEST).read_text())["format_version"] for each in (written, mixed_written)]
    assert versions == [1, 2]
    expected, found = flatten(mixed), flatten(read_artifact(mixed_written).params)
    kinds = {path: (type(leaf), getattr(leaf, "bits", None)) for path, leaf in found.items()}
    assert kinds[QKV] == (UniformTensor, 8) and kinds[TOKEN_EMBEDDING] == kinds[PATCH_EMBEDDING] == (UniformTensor, 4)
    assert kinds["text/blocks/mlp/fc1/kernel"][0] is TernaryTensor
    for path, leaf in expected.items():
        if isinstance(leaf, UniformTensor | TernaryTensor):
            assert (found[path].group, found[path].axis, found[path].shape) == (leaf.group, leaf.axis, leaf.shape)
            np.testing.assert_array_equal(found[path].integers, leaf.integers)
            np.testing.assert_array_equal(np.asarray(found[path].scale).view(np.uint32), leaf.scale.view(np.uint32))


def test_latent_and_packed_parameters_verify(
    mixed_written: pathlib.Path, latent: Tree, mixed: Tree, mixed_rules: TernaryRules
) -> None:
    outcome = verify_artifact(mixed_written, latent, mixed_rules)
    assert outcome == verify_artifact(mixed_written, mixed) and outcome.differences == ()
    leaves = flatten(mixed).values()
    assert outcome.integers == sum(leaf.integers.size for leaf in leaves if isinstance(leaf, UniformTensor)) > 0
    floats = dict(flatten(mixed)) | {QKV: np.asarray(flatten(mixed)[QKV].dequantize())}
    assert verify_artifact(mixed_written, _tree(floats)).differences == ()


def test_integers_that_differ_anywhere_are_named(
    mixed_written: pathlib.Path, mixed: Tree, latent: Tree, rules: TernaryRules
) -> None:
    leaves = dict(flatten(copy.deepcopy(mixed)))
    data = np.array(leaves[QKV].data)
    data[1, 2, 3] ^= 1
    leaves[QKV] = dataclasses.replace(leaves[QKV], data=data)
    (difference,) = verify_artifact(mixed_written, _tree(leaves)).differences
    assert difference == f"{QKV}: 1 of {data.size:,} integers differ, the first at (1, 2, 3)"
    differences = verify_artifact(mixed_written, latent, rules).differences
    assert f"{QKV}: integers of 8 bits, expected trits" in differences
    assert f"{TOKEN_EMBEDDING}: integers of 4 bits, expected trits" in differences
    assert f"{PATCH_EMBEDDING}: integers of 4 bits, expected trits" not in differences  # no rule: values are compared
    assert any(each.startswith(f"{PATCH_EMBEDDING}: ") and "weights differ" in each for each in differences)


def test_sizes_are_counted_by_part_and_by_tensor(mixed_written: pathlib.Path, mixed: Tree) -> None:
    found = inspect_artifact(mixed_written)
    assert json.loads(json.dumps(found)) == found
    stored: Tree = {}
    for file in ("ternary", "rest"):
        stored |= safetensors.numpy.load_file(mixed_written / f"{file}.safetensors")
    assert found["bytes"]["integers"] == sum(a.nbytes for name, a in stored.items() if name.endswith(".integers"))
    for sizes in (found["bytes"].values(), [part["bytes"] for part in found["parts"].values()]):
        assert sum(sizes) == found["weight_bytes"]
    tensors = {tensor["path"]: tensor for tensor in found["tensors"]}
    table = tensors[TOKEN_EMBEDDING]
    assert table["bytes"] == sum(stored[f"{TOKEN_EMBEDDING}.{part}"].nbytes for part in ("integers", "scale"))
    # 50 rows of 16 weights in 8 bytes, and 4 scales of 2 bytes.
    assert table["resident_bytes"] == 50 * (8 + 4 * 2)
    assert found["parts"]["token embedding"] == {key: table[key] for key in ("parameters", "bytes", "resident_bytes")}
    arrays = list(flatten(repack_params(mixed)).values())
    resident = sum(
        each.data.nbytes + each.scale.nbytes
        if hasattr(each, "layer_shape") or isinstance(each, UniformTensor)
        else each.nbytes
        for each in arrays
    )
    assert found["resident_bytes"] == resident == sum(part["resident_bytes"] for part in found["parts"].values())
    assert found["uniform_share"] + found["ternary_share"] < 1 < found["uniform_share"] / found["ternary_share"] + 1
    text = inspection_text(found)
    assert "uniform bits=8 group=channel" in text and "token embedding" in text and "4 and 8 bits" in text
    assert found["compression_theoretical"] is None and "formula" not in text and "zeros" in text
    assert len(plot_inspection(found).axes[0].patches) == 4


def test_the_commands_show_it(mixed_written: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(mixed_written), str(mixed_written)]) == 0
    assert " integers, " in capsys.readouterr().out
    assert main(["inspect", str(mixed_written), "--runtime", "--json"]) == 0
    rows = {row["path"]: row for row in json.loads(capsys.readouterr().out)["weights"]}
    assert rows[QKV]["implementation"] == "dequantize" and rows[TOKEN_EMBEDDING]["implementation"] == "rows"


def test_a_loaded_model_computes_with_the_dequantized_weights(mixed_written: pathlib.Path) -> None:
    model = Model.load(mixed_written, activations="A32", implementation="reference")
    leaves = {
        path: np.asarray(leaf.dequantize()) if isinstance(leaf, TernaryTensor | UniformTensor) else leaf
        for path, leaf in flatten(read_artifact(mixed_written).params).items()
    }
    leaves[PATCH_EMBEDDING] = leaves[PATCH_EMBEDDING].reshape(8, 8, 3, -1)
    floats = Model(model.config, model.preprocess, _tree(leaves))
    rng = np.random.default_rng(0)
    pixels, tokens = rng.standard_normal((3, 16, 16, 3), np.float32), rng.integers(0, 50, (3, 6), np.int32)
    np.testing.assert_allclose(model.encode_image(pixels), floats.encode_image(pixels), atol=2e-6)
    np.testing.assert_allclose(model.encode_text(tokens), floats.encode_text(tokens), atol=2e-6)


@pytest.mark.parametrize(
    ("changed", "path", "message"),
    [
        ({"format_version": 1}, None, r"has coding 'int8\+zstd': it must be base3\+zstd or planes\+zstd$"),
        ({"coding": "int2+zstd"}, QKV, r"has coding 'int2\+zstd': it must be .* or int4\+zstd or int8\+zstd$"),
        ({"coding": "int4+zstd"}, QKV, r"qkv/kernel\.integers expands to 3456 bytes: the frame must declare 1728,"),
        ({"coding": "base3+zstd"}, QKV, r"ternary\.safetensors does not fit the model: missing .*qkv/kernel\.scale"),
        ({"group": 7}, QKV, r"has scale_shape \[2, 1, 72\]: it must be \[2, 4, 72\]"),
        ({"axis": -1}, QKV, "has axis -1: it must be -2"),
        ({"coding": "int8+zstd"}, "image/ln_pre/bias", r"int8\+zstd: this parameter must be planes\+zstd"),
    ],
)
def test_forged_manifests_are_refused(copied: pathlib.Path, changed: Tree, path: str | None, message: str) -> None:
    manifest = json.loads((copied / MANIFEST).read_text())
    (manifest["tensors"][path] if path else manifest).update(changed)
    (copied / MANIFEST).write_bytes(dump_manifest(manifest))
    with pytest.raises(ArtifactError, match=message):
        read_artifact(copied)


def test_a_forged_file_is_refused(copied: pathlib.Path) -> None:
    file = copied / "rest.safetensors"
    stored = safetensors.numpy.load(file.read_bytes())
    del stored[f"{QKV}.scale"]
    file.write_bytes(safetensors.numpy.save(stored))
    manifest = json.loads((copied / MANIFEST).read_text())
    manifest["files"][file.name] = file_entry(epath.Path(file))
    (copied / MANIFEST).write_bytes(dump_manifest(manifest))
    with pytest.raises(ArtifactError, match=rf"rest\.safetensors does not fit the model: missing {QKV}\.scale"):
        read_artifact(copied)


def _tree(leaves: Tree) -> Tree:
    return unflatten_dict(leaves, sep="/")
