"""The page of an export in Chromium: embeddings, what it classifies and ranks, drawings."""

from __future__ import annotations

import base64
import dataclasses
import io
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tclip_jax.data.images import Preprocess
from tclip_jax.data.tokenizer import Tokenizer
from tclip_jax.interop.examples import embed
from tclip_jax.interop.export import export_model
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import PRESETS
from tests.interop.browser import CONFIG, Open, Page, draw_params, photo, png, run_alone, settled, shown

pytestmark = pytest.mark.runtimes

TEXTS = [
    "",
    "!",
    "a photo of a cat",
    "two dogs 🐕 on 3 beaches",
    "naïve café " * 20,
    *("a " * length for length in range(12, 17)),
]
MIN_COSINE = 0.9995
EMBED = """async ([files, texts, backend]) => {
    const { loadModel } = await import("./model.js");
    const model = await loadModel(await (await fetch("demo.json")).json(), backend, () => {});
    const images = [];
    for (const file of files) images.push(await model.encodeImage(await (await fetch(`data:;base64,${file}`)).blob()));
    const lists = (rows) => rows.map((row) => [...row]);
    return { ...model, image: lists(images), text: lists(await model.encodeTexts(texts)) };
}"""


def check_embeddings(page: Page, config: CLIPConfig, params: dict[str, Any], backend: str = "wasm") -> None:
    """Compares embeddings of pictures and captions of all lengths with those of the model in JAX."""
    files = [png(Image.fromarray(photo(*size))) for size in ((1, 5), (64, 48), (48, 64), (225, 223), (300, 1000))]
    found = page.evaluate(EMBED, [[base64.b64encode(file).decode() for file in files], TEXTS, backend])
    settings = Preprocess(config.vision.image_size)
    pixels = settings([Image.open(io.BytesIO(file)) for file in files])
    expected = embed(config, params, pixels, Tokenizer(config.text.context_length)(TEXTS))
    for ours, theirs in zip(expected, (found["image"], found["text"]), strict=True):
        assert (np.array(theirs) * ours).sum(axis=-1).min() >= MIN_COSINE
    assert found["backend"] == backend and found["notes"] == [] and found["cosine"] >= MIN_COSINE


def test_embeddings(demo: pathlib.Path, open_page: Open, demo_params: dict[str, Any]) -> None:
    check_embeddings(open_page(demo, load=False), CONFIG, demo_params)


def test_embeddings_in_webgpu(demo: pathlib.Path, open_page: Open, demo_params: dict[str, Any]) -> None:
    page = open_page(demo, load=False)
    if not page.evaluate("navigator.gpu?.requestAdapter().then(Boolean)"):
        pytest.skip("this Chromium has no WebGPU, not even in software")
    check_embeddings(page, CONFIG, demo_params, "webgpu")


def test_embeddings_of_a_model_whose_padding_counts(npm: pathlib.Path, open_page: Open, tmp_path: pathlib.Path) -> None:
    text = dataclasses.replace(CONFIG.text, no_causal_mask=True, pool_type="last")
    config = dataclasses.replace(CONFIG, text=text)
    params = draw_params(config)
    same: dict[str, Any] = {"config": config, "preprocess": Preprocess(32), "params": params}
    export_model(tmp_path / "demo", **same, formats=["onnx"], dtype="float16", demo=True, demo_runtime=npm)
    check_embeddings(open_page(tmp_path / "demo", load=False), config, params)


def test_the_page_classifies_and_searches(demo: pathlib.Path, open_page: Open, demo_params: dict[str, Any]) -> None:
    page = open_page(demo)
    settled(page, "document.querySelectorAll('#pictures .card .bar').length === 8 * 5")
    facts = page.locator("#facts").inner_text()
    assert "WebAssembly" in facts and " MB" in facts and " ms" in facts and page.locator(".problem").count() == 0
    assert "Checked" in page.locator("#status").inner_text()

    pictures = {f"{n}.png": photo(40, 50 + n, seed=n) for n in range(3)}
    files = [{"name": name, "mimeType": "image/png", "buffer": png(Image.fromarray(p))} for name, p in pictures.items()]
    page.locator("#files").set_input_files(
        [*files, {"name": "a.txt", "mimeType": "text/plain", "buffer": b"no picture"}]
    )
    page.locator("#labels").fill("cat\n dog \n\nhouse\ncat")
    page.locator("#template").fill("a photo of a {}, a {}")
    settled(
        page,
        "document.querySelectorAll('#pictures .card .bar').length === 11 * 3 && document.querySelector('.problem')",
    )
    assert page.locator(".problem").all_inner_texts() == ["a.txt: this browser cannot read it as a picture"]
    labels = ["cat", "dog", "house"]
    tokens = Tokenizer(16)([f"a photo of a {label}, a {label}" for label in labels])
    image, text = embed(CONFIG, demo_params, Preprocess(32)(list(pictures.values())), tokens)
    logits = np.exp(demo_params["logit_scale"]) * image @ text.T
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    found = {name: dict(zip(bars[::2], bars[1::2], strict=True)) for name, _, *bars in shown(page)}
    for name, row in zip(pictures, powers / powers.sum(axis=-1, keepdims=True), strict=True):
        assert [float(found[name][label].split()[0]) for label in labels] == pytest.approx(list(100 * row), abs=1)

    assert page.locator("#bare").is_hidden()
    page.locator("#template").fill("no place for a label")
    settled(page, "!document.querySelector('#bare').hidden")

    page.locator("#search").click()
    page.locator("#query").fill("two dogs")
    settled(page, "document.querySelectorAll('#pictures .card .bar').length === 11")
    ranked = [(name, rank, float(value)) for name, rank, _, value in shown(page)]
    _, query = embed(CONFIG, demo_params, Preprocess(32)(list(pictures.values())), Tokenizer(16)("two dogs"))
    similarities = {name: value for name, _, value in ranked}
    assert [similarities[name] for name in pictures] == pytest.approx(list(image @ query[0]), abs=5e-3)
    assert [value for *_, value in ranked] == sorted((value for *_, value in ranked), reverse=True)
    assert [rank for _, rank, _ in ranked] == [f"no. {n + 1}" for n in range(11)]


def test_a_drawing_is_classified(demo: pathlib.Path, open_page: Open) -> None:
    page = open_page(demo)
    settled(page, "document.querySelectorAll('#pictures .card .bar').length === 8 * 5")
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 100, box["y"] + 200, steps=5)
    page.mouse.up()
    page.wait_for_selector("#drawn .bar")
    (card,) = shown(page, "#drawn .card")
    assert len(card) == 2 + 2 * 5 and page.locator("#drawn img").evaluate("image => image.naturalWidth") == 8
    page.locator("#clear").click()
    settled(page, "!document.querySelector('#drawn .card')")


def test_memory_of_vit_b_32(npm: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tab's process, without a debugger, which would keep all that was downloaded."""
    config = CLIPConfig.from_open_clip(PRESETS["ViT-B-32"])
    params = draw_params(config, deviation=0.03)
    same: dict[str, Any] = {"config": config, "preprocess": Preprocess(224), "params": params}
    export_model(tmp_path / "demo", **same, formats=["onnx"], demo=True, demo_runtime=npm)
    done = "fetch('done');"
    page = tmp_path / "demo" / "main.js"
    page.write_text(page.read_text().replace("model.notes.forEach(problem);", f"model.notes.forEach(problem); {done}"))
    peaks = run_alone(tmp_path / "demo", tmp_path / "profile", until="/done")
    with capsys.disabled():
        print(f"\npeak resident memory of the tab: {peaks[-1] / 2**20:.0f} MiB")
    assert peaks[-1] <= 400 * 10**6
