"""What the page does with backends that are wrong, and with files that are missing or changed."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
from typing import Any

import pytest

from tclip_jax.data.images import Preprocess
from tclip_jax.interop.demo_page import (
    CDN_INTEGRITY,
    RUNTIME,
    RUNTIME_FILES,
    RUNTIME_VERSION,
    find_runtime,
    integrity,
)
from tclip_jax.interop.export import export_model
from tests.interop.browser import CONFIG, Open, draw_params, settled

pytestmark = pytest.mark.runtimes

STUB = """
const real = await import(new URL("onnxruntime-web/ort.wasm.bundle.min.mjs", document.baseURI));
export const { env, Tensor } = real;
export const InferenceSession = {
    async create(url, options) {
        const gpu = options.executionProviders[0] === "webgpu";
        if (gpu && KIND === "fails") throw new Error("no shader for it");
        const session = await real.InferenceSession.create(url, { ...options, executionProviders: ["wasm"] });
        const change = { right: (v) => v, wrong: (v, i) => (i % 2 ? v : -v), NaN: () => NaN }[KIND];
        return {
            outputNames: session.outputNames,
            release: () => session.release(),
            async run(feeds) {
                const outputs = await session.run(feeds);
                for (const { data } of Object.values(outputs)) if (gpu) data.set(data.map(change));
                return outputs;
            },
        };
    },
};
"""
# A browser whose WebGPU runs the stub.
GPU = "Object.defineProperty(navigator, 'gpu', { value: { requestAdapter: async () => ({ info: {} }) } });"


@pytest.mark.parametrize(
    ("kind", "backend", "note"),
    [
        ("right", "WebGPU", None),
        ("wrong", "WebAssembly", r"WebGPU computes wrong embeddings here \(cosine -?0\.\d{4} to .*WebAssembly runs"),
        ("NaN", "WebAssembly", r"WebGPU computes wrong embeddings here \(cosine NaN"),
        ("fails", "WebAssembly", r"WebGPU fails here, so WebAssembly runs instead: no shader for it"),
    ],
)
def test_a_wrong_webgpu_is_not_used(
    demo: pathlib.Path, open_page: Open, tmp_path: pathlib.Path, kind: str, backend: str, note: str | None
) -> None:
    copy = shutil.copytree(demo, tmp_path / "demo")
    stub = f"const KIND = {json.dumps(kind)};{STUB}".encode()
    (copy / RUNTIME / "stub.mjs").write_bytes(stub)
    document = json.loads((copy / "demo.json").read_bytes())
    files = document["runtime"]["files"]
    files["webgpu"] = [{"file": "stub.mjs", "integrity": integrity(stub)}, files["wasm"][1]]
    (copy / "demo.json").write_text(json.dumps(document))
    page = open_page(copy, script=GPU)
    settled(page, "document.querySelectorAll('#pictures .card .bar').length === 8 * 5")
    assert page.locator("#facts [data-name=Backend] dd").inner_text() == backend
    problems = page.locator(".problem").all_inner_texts()
    assert len(problems) == bool(note) and (note is None or re.search(note, problems[0]))


def test_wrong_results_of_every_backend_are_announced(
    demo: pathlib.Path, open_page: Open, tmp_path: pathlib.Path
) -> None:
    copy = shutil.copytree(demo, tmp_path / "demo")
    document = json.loads((copy / "demo.json").read_bytes())
    document["reference"]["image"][0].reverse()
    (copy / "demo.json").write_text(json.dumps(document))
    page = open_page(copy)
    (problem,) = page.locator(".problem").all_inner_texts()
    assert "other embeddings than the exported model" in problem and "do not trust" in problem
    assert "Checked" not in page.locator("#status").inner_text()


@pytest.mark.parametrize(
    "broken", ["demo.json", "tokenizer.json", "onnx/text_model_q2.onnx", "shorter", "longer", "runtime"]
)
def test_missing_and_changed_files_are_named(
    demo: pathlib.Path, open_page: Open, tmp_path: pathlib.Path, broken: str
) -> None:
    copy = shutil.copytree(demo, tmp_path / "demo")
    if broken == "runtime":
        broken = f"{RUNTIME}/ort-wasm-simd-threaded.wasm"
        (copy / broken).write_bytes((copy / broken).read_bytes() + b"\0")
    elif broken in ("shorter", "longer"):
        change, broken = (-1 if broken == "shorter" else 1), "onnx/vision_model_q2.onnx"
        content = (copy / broken).read_bytes()
        (copy / broken).write_bytes((content + b"\0")[: len(content) + change])
    else:
        (copy / broken).unlink()
    page = open_page(copy)
    (problem,) = page.locator(".problem").all_inner_texts()
    assert broken in problem and problem.count("\n") == 0 and page.locator(".card").count() == 0


def test_the_runtime_of_the_network_must_have_the_hashes(
    npm: pathlib.Path, demo: pathlib.Path, open_page: Open, tmp_path: pathlib.Path
) -> None:
    """The hashes of this package are those of npm's files; a browser refuses others."""
    same: dict[str, Any] = {"config": CONFIG, "preprocess": Preprocess(32), "params": draw_params(CONFIG)}
    export_model(tmp_path / "demo", **same, formats=["onnx"], demo=True)
    dist = find_runtime(npm)
    version = json.loads((dist.parent / "package.json").read_bytes())["version"]
    if version != RUNTIME_VERSION:
        pytest.skip(f"onnxruntime-web {version} is installed, and the page loads {RUNTIME_VERSION}")
    for name, expected in CDN_INTEGRITY.items():
        assert integrity((dist / name).read_bytes()) == expected
    page = open_page(tmp_path / "demo", cdn=dist)
    assert page.locator(".problem").count() == 0 and page.locator("#facts [data-name=Backend]").count() == 1
    for name in RUNTIME_FILES["wasm"]:
        shutil.copy(dist / name, tmp_path / name)
    with (tmp_path / RUNTIME_FILES["wasm"][0]).open("ab") as file:
        file.write(b"\n// changed")
    page = open_page(tmp_path / "demo", cdn=tmp_path)
    (problem,) = page.locator(".problem").all_inner_texts()
    assert "cannot be loaded, or is not the file that the export named" in problem
