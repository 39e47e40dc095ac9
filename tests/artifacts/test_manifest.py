from __future__ import annotations

import hashlib
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest

from tclip_jax.artifacts.manifest import (
    MANIFEST,
    ArtifactError,
    check_tensors,
    describe,
    dump_manifest,
    parse_manifest,
)
from tclip_jax.artifacts.pack import flatten
from tclip_jax.ternary import Quantizer

Tree = dict[str, Any]

FC1 = "image/blocks/mlp/fc1/kernel"
PROJECTION = "text/projection/kernel"


@pytest.fixture
def manifest(written: pathlib.Path) -> Tree:
    return parse_manifest((written / MANIFEST).read_bytes())


def test_checksum_is_the_documented_one(written: pathlib.Path) -> None:
    data = (written / MANIFEST).read_bytes()
    digest = json.loads(data)["sha256"]
    assert data.count(digest.encode()) == 1
    assert hashlib.sha256(data.replace(digest.encode(), b"0" * 64)).hexdigest() == digest


def test_any_flipped_bit_is_noticed(written: pathlib.Path) -> None:
    data = (written / MANIFEST).read_bytes()
    for position in range(0, len(data), 97):
        flipped = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        with pytest.raises(ArtifactError, match=r"^tclip\.json"):
            parse_manifest(flipped)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b'{"figures": NaN}', b"[" * 100_000, b"1" * 10_000])
def test_what_is_not_a_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"^tclip\.json (is not JSON|does not describe)"):
        parse_manifest(data)


@pytest.mark.parametrize("version", [3, 0, "1", None, [1], True, 1.0, 2.0])
def test_other_versions_are_refused_before_the_checksum(version: Any) -> None:
    data = json.dumps({"format": "tclip", "format_version": version}).encode()
    with pytest.raises(ArtifactError, match=f"format_version is {re.escape(repr(version))}, and this .* reads 1 to 2"):
        parse_manifest(data)


@pytest.mark.parametrize("digest", [None, 1, "", "0" * 63, "G" * 64])
def test_a_checksum_that_is_none_is_refused(digest: Any) -> None:
    data = json.dumps({"format": "tclip", "format_version": 1, "sha256": digest}).encode()
    with pytest.raises(ArtifactError, match=r"sha256 is .*: it must be 64 hexadecimal digits"):
        parse_manifest(data)


@pytest.mark.parametrize("key", ["model_cfg", "preprocess_cfg", "tensors", "files", "figures", "provenance"])
def test_missing_parts_are_named(key: str) -> None:
    fields = {"model_cfg": {}, "preprocess_cfg": {}, "tensors": {}, "files": {}}
    with pytest.raises(ArtifactError, match=f"{key} is \\[\\]: it must be an object"):
        parse_manifest(dump_manifest(fields | {key: []}))


@pytest.mark.parametrize(
    ("key", "edit"),
    [
        ("model_cfg", lambda m: m["model_cfg"].update(embed_dim="many")),
        ("model_cfg", lambda m: m["model_cfg"].update(text_cfg=3)),
        ("model_cfg", lambda m: m["model_cfg"].pop("text_cfg")),
        ("model_cfg", lambda m: m["model_cfg"]["vision_cfg"].update(patch_size=0)),
        ("model_cfg", lambda m: m["model_cfg"]["vision_cfg"].update(timm_model_name="vit")),
        ("preprocess_cfg", lambda m: m["preprocess_cfg"].update(std=[0, 0, 0])),
        ("preprocess_cfg", lambda m: m["preprocess_cfg"].update(size="big")),
        ("ternary", lambda m: m.pop("ternary")),
        ("ternary", lambda m: m.update(ternary=[["(", {}]])),
        ("ternary", lambda m: m.update(ternary=[[".*", {"factor": -1}]])),
        ("ternary", lambda m: m.update(ternary=[[".*", {"levels": 3}]])),
    ],
)
def test_configurations_that_no_model_has_are_refused(manifest: Tree, key: str, edit: Callable[[Tree], Any]) -> None:
    edit(manifest)
    with pytest.raises(ArtifactError, match=rf"^tclip\.json: {key} is not usable: \w+: [^\n]*$"):
        describe(manifest)


def test_regexes_of_a_stranger_are_not_run(manifest: Tree) -> None:
    endless = "((([a-z/_]+)+)+)+!"
    manifest["ternary"] = [[endless, {}]]
    assert describe(manifest).rules == ((endless, Quantizer()),)


def test_shapes_that_no_array_has_are_refused(manifest: Tree) -> None:
    manifest["model_cfg"]["vision_cfg"]["mlp_ratio"] = 1e-9
    with pytest.raises(ArtifactError, match=r"gives image/blocks/mlp/fc1/\w+ the shape \([\d, ]*0,?\)"):
        describe(manifest)


def test_models_beyond_any_memory_are_refused(manifest: Tree) -> None:
    manifest["model_cfg"]["text_cfg"]["vocab_size"] = 10**9
    with pytest.raises(ArtifactError, match=r"model_cfg has 160000.* parameters: at most 4294967296 are read"):
        describe(manifest)


def test_preprocessing_for_another_size_is_refused(manifest: Tree) -> None:
    manifest["preprocess_cfg"]["size"] = [224, 224]
    with pytest.raises(ArtifactError, match=r"size is \(224, 224\): the model's is \(16, 16\)"):
        describe(manifest)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(FC1), f"tensors does not fit the model: missing {FC1}"),
        (lambda t: t.update(virus={}), "tensors does not fit the model: unexpected virus"),
        (lambda t: t.update({FC1: 3}), f"{FC1} is 3: it must be an object"),
        (lambda t: t[FC1].update(coding="rar"), f"{FC1} has coding 'rar': it must be base3\\+zstd or planes\\+zstd"),
        (lambda t: t[FC1].pop("coding"), f"{FC1} has coding None"),
        (lambda t: t[FC1].update(shape=[2, 24, 97]), r"has shape \[2, 24, 97\]: it must be \[2, 24, 96\]"),
        (lambda t: t[FC1].update(shape=[2, 24.0, 96]), r"has shape \[2, 24\.0, 96\]: it must be \[2, 24, 96\]"),
        (lambda t: t[FC1].update(scale_shape=[2, 2, 96.0]), r"has scale_shape \[2, 2, 96\.0\]: it must be"),
        (lambda t: t[FC1].update(dtype="int8"), "has dtype 'int8': it must be float16 or float32"),
        (lambda t: t[FC1].update(axis=-1), "has axis -1: it must be -2"),
        (lambda t: t[FC1].update(axis=-2.0), r"has axis -2\.0: it must be -2"),
        (lambda t: t[FC1].update(group=0), "has group 0: it must be an integer from 1 to 24"),
        (lambda t: t[FC1].update(group=25), "has group 25: it must be an integer from 1 to 24"),
        (lambda t: t[FC1].update(group=True), "has group True"),
        (lambda t: t[FC1].update(group=4), r"has scale_shape \[2, 2, 96\]: it must be \[2, 6, 96\]"),
        (lambda t: t[FC1].update(scale_shape=[2, 1, 1]), r"has scale_shape \[2, 1, 1\]: it must be \[2, 2, 96\]"),
        (lambda t: t[FC1].update(group=24), r"it must be \[2, 1, 96\] or \[2, 1, 1\]"),
        (lambda t: t["image/ln_pre/bias"].update(coding="base3+zstd"), r"this parameter must be planes\+zstd"),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_refused(
    manifest: Tree, edit: Callable[[Tree], Any], message: str
) -> None:
    edit(manifest["tensors"])
    with pytest.raises(ArtifactError, match=rf"^tclip\.json: .*{message}"):
        check_tensors(manifest["tensors"], flatten(describe(manifest).shapes))
