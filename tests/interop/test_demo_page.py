"""The folder of the page: it is whole, links what is there, and bad options are refused in one line."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tclip_jax.artifacts import write_artifact
from tclip_jax.cli import main
from tclip_jax.data.images import Preprocess
from tclip_jax.data.tokenizer import Tokenizer
from tclip_jax.interop.demo_page import (
    CDN,
    CDN_INTEGRITY,
    PAGE,
    RUNTIME,
    RUNTIME_FILES,
    RUNTIME_VERSION,
    find_runtime,
    integrity,
)
from tclip_jax.interop.examples import embed
from tclip_jax.interop.export import export_model
from tclip_jax.interop.privacy import find_private
from tests.interop.browser import CONFIG, draw_params

pytest.importorskip("onnx", reason="the onnx package is not installed (pip install -e '.[onnx]')")

Params = dict[str, Any]


@pytest.fixture(scope="module")
def artifact(demo_params: Params, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("model") / "artifact"
    write_artifact(folder, config=CONFIG, preprocess=Preprocess(32), params=demo_params, rules=(), rest_dtype="float32")
    return folder


@pytest.fixture(scope="module")
def exported(artifact: pathlib.Path) -> pathlib.Path:
    out = artifact.parent / "demo"
    assert main(["export", str(artifact), "--to", "onnx", "--demo", "--out", str(out)]) == 0
    return out


@pytest.fixture
def package(tmp_path: pathlib.Path) -> pathlib.Path:
    """A stand-in of the npm package."""
    folder = tmp_path / "node_modules" / RUNTIME
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": RUNTIME, "version": RUNTIME_VERSION}))
    for name in sum(RUNTIME_FILES.values(), ()):
        (folder / "dist" / name).write_text(f"content of {name}")
    return folder


def test_the_folder_has_all_that_the_page_loads(exported: pathlib.Path) -> None:
    document = json.loads((exported / "demo.json").read_bytes())
    for tower, name in (("image", "vision"), ("text", "text")):
        file = document["towers"][tower]
        assert (
            file["file"] == f"onnx/{name}_model_q2.onnx" and (exported / file["file"]).stat().st_size == file["bytes"]
        )
    assert document["runtime"]["base"] == CDN and not (exported / RUNTIME).exists()
    assert (exported / "tokenizer.json").is_file() and "http.server" in (exported / "README.md").read_text()
    text = {name: (exported / name).read_text(encoding="utf-8") for name in PAGE}
    links = re.findall(r'(?:href|src)="([^":]+)"', text["index.html"])
    links += [link for name in PAGE for link in re.findall(r'from "\./([^"]+)"', text[name])]
    assert set(links) == set(PAGE) - {"index.html"}
    fetched = re.findall(r'fetch(?:Ok)?\("([^"]+)"', "".join(text.values()))
    assert set(fetched) == {"demo.json", "tokenizer.json"}
    identifiers = re.findall(r'\$\("(\w+)"\)', text["main.js"])
    assert set(identifiers) <= set(re.findall(r'id="([\w-]+)"', text["index.html"]))
    # All that the page may connect to, beside its own folder.
    assert re.findall(r"connect-src ([^;]+);", text["index.html"]) == ["'self' data: blob: https://cdn.jsdelivr.net"]
    assert CDN.startswith("https://cdn.jsdelivr.net/")


def test_the_reference_is_that_of_the_model(exported: pathlib.Path, demo_params: Params) -> None:
    reference = json.loads((exported / "demo.json").read_bytes())["reference"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) for url in reference["pictures"]]
    expected = embed(CONFIG, demo_params, Preprocess(32)(pictures), Tokenizer(16)(reference["captions"]))
    for found, embeddings in zip((reference["image"], reference["text"]), expected, strict=True):
        np.testing.assert_allclose(found, embeddings, rtol=0, atol=1e-6)


def test_hashes_are_those_of_the_standard(package: pathlib.Path) -> None:
    for name in sum(RUNTIME_FILES.values(), ()):
        assert re.fullmatch(r"sha384-[A-Za-z0-9+/]{64}", CDN_INTEGRITY[name])
    expected = base64.b64encode(hashlib.sha384(b"alert('Hello, world.');").digest()).decode()
    assert integrity(b"alert('Hello, world.');") == f"sha384-{expected}"
    # The example of the specification, https://www.w3.org/TR/SRI/
    assert expected == "H8BRh8j48O9oYatfu5AZzq6A9RINhZO5H16dQZngK7T62em8MUt1FLm52t+eX6xO"


def test_an_npm_package_is_copied(
    artifact: pathlib.Path, package: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, path in enumerate((package, tmp_path)):
        out = tmp_path / f"demo{number}"
        options = ["--to", "onnx", "--demo", "--onnxruntime-web", str(path), "--out", str(out)]
        assert main(["export", str(artifact), *options]) == 0
        assert f"{RUNTIME} copied" in capsys.readouterr().out
        runtime = json.loads((out / "demo.json").read_bytes())["runtime"]
        assert runtime["base"] == f"{RUNTIME}/"
        files = [file for each in runtime["files"].values() for file in each]
        assert [file["file"] for file in files] == [*RUNTIME_FILES["wasm"], *RUNTIME_FILES["webgpu"]]
        for file in files:
            assert file["integrity"] == integrity((out / RUNTIME / file["file"]).read_bytes())


def test_a_model_of_digits_gets_its_labels_and_samples(demo_params: Params, tmp_path: pathlib.Path) -> None:
    for source, digits in (("digits", True), ("folder:pictures", False)):
        same: dict[str, Any] = {"config": CONFIG, "preprocess": Preprocess(32), "params": demo_params}
        provenance = {"data": {"source": source}}
        export_model(tmp_path / "demo", **same, formats=["onnx"], demo=True, provenance=provenance, overwrite=True)
        document = json.loads((tmp_path / "demo" / "demo.json").read_bytes())
        assert document["digits"] is digits and len(document["samples"]) == 8 * digits
        assert document["template"].count("{}") == 1 and ("seven" in document["labels"]) is digits
        # The samples and the reference are pictures in base64, which `tclip push` must not take for paths.
        files = [path for path in sorted((tmp_path / "demo").rglob("*")) if path.is_file()]
        assert [each for path in files for each in find_private(path, path.name)] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "hf", "--demo"], "--demo is for onnx, and --to is hf"),
        (["--to", "onnx-fp32", "--demo"], "--demo is for onnx"),
        (["--to", "onnx", "--onnxruntime-web", "x"], "--onnxruntime-web is for --demo"),
        (["--to", "onnx", "--demo", "--onnxruntime-web", "none"], "none is not the npm package onnxruntime-web"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    options: list[str], message: str, artifact: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(artifact), *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_packages_that_do_not_fit_are_refused(package: pathlib.Path) -> None:
    described = package / "package.json"
    for text, message in (
        ("{", "states no name and version"),
        ("[]", "states no name and version"),
        ('{"name": "onnxruntime-web", "version": "new"}', "states no name and version"),
        ('{"name": "onnxruntime-node", "version": "1.30.0"}', "is 'onnxruntime-node' 1.30.0"),
        ('{"name": "onnxruntime-web", "version": "1.20.1"}', "1.20.1: onnxruntime-web 1.30.0 or newer is needed"),
    ):
        described.write_text(text)
        with pytest.raises(ValueError, match=re.escape(message)):
            find_runtime(package)
    described.write_text(json.dumps({"name": RUNTIME, "version": RUNTIME_VERSION}))
    (package / "dist" / RUNTIME_FILES["webgpu"][1]).unlink()
    with pytest.raises(ValueError, match=r"has no dist/ort-wasm-simd-threaded.asyncify.wasm"):
        find_runtime(package)


def test_another_vocabulary_is_refused(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, vocab_size=100))
    same: dict[str, Any] = {"config": config, "preprocess": Preprocess(32), "params": draw_params(config)}
    with pytest.raises(ValueError, match="vocab_size 100: the page has CLIP's tokenizer, of 49408 tokens"):
        export_model(tmp_path / "demo", **same, formats=["onnx"], demo=True)
    assert not (tmp_path / "demo").exists()
