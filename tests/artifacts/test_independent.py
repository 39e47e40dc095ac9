"""The document describes the format: a writer that follows it, and the reader printed in it, agree with the package."""

from __future__ import annotations

import importlib.util
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from tclip_jax.artifacts import read_artifact
from tclip_jax.artifacts.pack import flatten
from tclip_jax.models.config import CLIPConfig
from tclip_jax.ternary import QuantizedTensor, TernaryTensor, UniformTensor

Tree = dict[str, Any]

spec = importlib.util.spec_from_file_location(
    "independent_writer", pathlib.Path(__file__).with_name("independent_writer.py")
)
assert spec and spec.loader
independent_writer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(independent_writer)


@pytest.fixture(scope="session", params=["packed", "mixed"])
def params(request: pytest.FixtureRequest) -> Tree:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory, config: CLIPConfig, params: Tree) -> pathlib.Path:
    """The model, written by the independent writer."""
    folder = tmp_path_factory.mktemp("independent") / "artifact"
    ternary, floats, integers = {}, {}, {}
    for path, leaf in flatten(params).items():
        if isinstance(leaf, TernaryTensor):
            ternary[path] = (np.asarray(leaf.trits), np.asarray(leaf.scale), leaf.group, leaf.axis)
        elif isinstance(leaf, UniformTensor):
            integers[path] = (np.asarray(leaf.integers), leaf.bits, np.asarray(leaf.scale), leaf.group, leaf.axis)
        else:
            floats[path] = leaf
    independent_writer.write(folder, config.to_open_clip(), ternary, floats, integers)
    return folder


@pytest.fixture(scope="session")
def ours(params: Tree, packed: Tree, written: pathlib.Path, mixed_written: pathlib.Path) -> pathlib.Path:
    return written if params is packed else mixed_written


def documented_reader(folder: pathlib.Path) -> dict[str, np.ndarray]:
    page = pathlib.Path(__file__).parents[2] / "docs" / "artifact.md"
    code = page.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    names: Tree = {}
    exec(code.replace('"artifact"', repr(str(folder))), names)
    return names["weights"]


def test_another_writer_is_read_to_the_bit(theirs: pathlib.Path, config: CLIPConfig, params: Tree) -> None:
    loaded = read_artifact(theirs)
    assert loaded.config == config and loaded.rules == () and "provenance" not in loaded.manifest
    expected, leaves = flatten(params), flatten(loaded.params)
    assert leaves.keys() == expected.keys()
    for path, leaf in expected.items():
        if isinstance(leaf, QuantizedTensor):
            assert type(leaves[path]) is type(leaf)
            np.testing.assert_array_equal(leaves[path].integers, leaf.integers)
            np.testing.assert_array_equal(leaves[path].scale, leaf.scale)
            assert (leaves[path].group, leaves[path].axis) == (leaf.group, leaf.axis)
        else:
            np.testing.assert_array_equal(leaves[path], leaf)


def test_both_writers_give_the_same_checksums_of_tensors(theirs: pathlib.Path, ours: pathlib.Path) -> None:
    entries = json.loads((ours / "tclip.json").read_text())["tensors"]
    for path, entry in json.loads((theirs / "tclip.json").read_text())["tensors"].items():
        if entry["dtype"] == entries[path]["dtype"]:
            assert entry == entries[path]


@pytest.mark.parametrize("which", ["theirs", "ours"])
def test_the_documented_reader_reads_both(which: str, params: Tree, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    weights, dtypes = documented_reader(folder), json.loads((folder / "tclip.json").read_text())["tensors"]
    assert weights.keys() == flatten(params).keys()
    for path, leaf in flatten(params).items():
        if isinstance(leaf, QuantizedTensor):
            np.testing.assert_array_equal(weights[path], leaf.dequantize())
        else:
            np.testing.assert_array_equal(weights[path], leaf.astype(dtypes[path]["dtype"]))
