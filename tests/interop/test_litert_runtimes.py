"""Exported LiteRT files in the runtime: embeddings of models with every option, batches, taps, and the page's code."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tclip_jax.artifacts import write_artifact
from tclip_jax.cli import main
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.examples import make_examples
from tclip_jax.interop.export import export_model
from tclip_jax.interop.litert import verify_embeddings, verify_litert, write_litert
from tclip_jax.interop.litert_session import run_litert
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import PRESETS
from tclip_jax.models.ternary_rules import MLP, TOKEN_EMBEDDING
from tclip_jax.ternary import Quantizer
from tests.interop.model_shapes import RULES, TEXT, VISION, clip_configs, draw_params

pytest.importorskip("litert_converter", reason="litert-converter is not installed (pip install -e '.[litert]')")
pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed (pip install -e '.[litert]')")
pytestmark = pytest.mark.runtimes

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = CLIPConfig(20, VISION, TEXT)
# One patch, and the vocabulary of the tokenizer.
WORDS = CLIPConfig(20, dataclasses.replace(VISION, image_size=(8, 8)), dataclasses.replace(TEXT, vocab_size=49408))


def write(folder: pathlib.Path, config: CLIPConfig, params: dict[str, Any], batch: int = 1) -> None:
    write_litert(folder, config=config, preprocess=Preprocess(config.vision.image_size), params=params, batch=batch)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=clip_configs(),
    rules=st.sampled_from(sorted(RULES)),
    batch=st.integers(1, 3),
)
def test_every_option_of_the_towers(
    config: CLIPConfig,
    rules: str,
    batch: int,
    tmp_path_factory: pytest.TempPathFactory,
    fast_compilation: None,
) -> None:
    folder, params = tmp_path_factory.mktemp("litert"), draw_params(config, RULES[rules])
    write(folder, config, params, batch)
    verify_litert(folder, params)
    verify_embeddings(folder, make_examples(config, params))


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_look_ups_and_products_with_float_weights_are_exact(quick_gelu: bool, tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIG, quick_gelu=quick_gelu)
    params = draw_params(config, ((TOKEN_EMBEDDING, Quantizer(group=32)),))
    write(tmp_path, config, params)
    examples = make_examples(config, params)
    for name, inputs, expected in (
        ("image", examples.pixels, examples.image),
        ("text", examples.tokens, examples.text),
    ):
        found = run_litert((tmp_path / f"{name}.tflite").read_bytes(), inputs)[0][:, 0]
        np.testing.assert_allclose(found / np.linalg.norm(found, axis=-1, keepdims=True), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "rules",
    [
        {r".*/kernel": Quantizer(kind="uniform", bits=8, group="channel"), TOKEN_EMBEDDING: Quantizer(group=32)},
        {r".*": Quantizer(kind="uniform", bits=4, group=32)},
        {MLP: Quantizer(group=32), r".*": Quantizer(kind="uniform", bits=4, group="channel")},
        {TOKEN_EMBEDDING: Quantizer(kind="uniform", bits=8, group="channel"), MLP: Quantizer(group=32)},
    ],
)
def test_weights_of_4_and_8_bits(rules: dict[str, Quantizer], tmp_path: pathlib.Path) -> None:
    params = draw_params(CONFIG, tuple(rules.items()))
    write(tmp_path, CONFIG, params)
    verify_litert(tmp_path, params)
    assert "embeddings have a cosine of " in verify_embeddings(tmp_path, make_examples(CONFIG, params))


@pytest.mark.parametrize("bits", [4, 8])
def test_look_ups_of_integers_are_exact(bits: Any, tmp_path: pathlib.Path) -> None:
    params = draw_params(CONFIG, ((TOKEN_EMBEDDING, Quantizer(kind="uniform", bits=bits, group="channel")),))
    write(tmp_path, CONFIG, params)
    examples = make_examples(CONFIG, params)
    found = run_litert((tmp_path / "text.tflite").read_bytes(), examples.tokens)[0][:, 0]
    np.testing.assert_allclose(found / np.linalg.norm(found, axis=-1, keepdims=True), examples.text, rtol=0, atol=1e-5)


def test_embeddings_that_differ_are_refused(tmp_path: pathlib.Path) -> None:
    params = draw_params(CONFIG, RULES["Q-ALL"])
    write(tmp_path, CONFIG, params)
    examples = make_examples(CONFIG, params)
    assert "embeddings have a cosine of 0.9" in verify_embeddings(tmp_path, examples)
    with pytest.raises(ValueError, match=r"cosine of .*: it must be 0\.9995 or more"):
        verify_embeddings(tmp_path, examples._replace(image=examples.image[::-1]))


def test_a_file_takes_its_batch_alone(tmp_path: pathlib.Path) -> None:
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    params = draw_params(CONFIG, RULES["Q-ALL"])
    write(tmp_path, CONFIG, params, batch=3)
    session = interpreter.Interpreter(str(tmp_path / "image.tflite"))
    assert session.get_signature_list() == {
        "serving_default": {"inputs": ["pixel_values"], "outputs": ["image_embeds"]}
    }
    run = session.get_signature_runner()
    pixels = np.random.default_rng(0).standard_normal((3, 16, 16, 3), np.float32)
    embeds = run(pixel_values=pixels)["image_embeds"]
    assert embeds.shape == (3, CONFIG.embed_dim)
    with pytest.raises(RuntimeError):
        run(pixel_values=pixels[:2])
    (parts,) = run_litert((tmp_path / "image.tflite").read_bytes(), np.concatenate([pixels, pixels[:1]]))
    np.testing.assert_allclose(parts[:, 0], np.concatenate([embeds, embeds[:1]]), rtol=0, atol=1e-5)


def test_a_file_that_litert_cannot_run_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^ai-edge-litert [\d.]+: "):
        run_litert(b"not LiteRT", np.zeros((1, 2), np.int32))


def test_the_code_of_the_page_and_of_the_card_runs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same: dict[str, Any] = {"config": WORDS, "preprocess": Preprocess(8), "params": draw_params(WORDS, RULES["Q-ALL"])}
    export_model(tmp_path / "release", **same, formats=["litert"])
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8").partition("\n## LiteRT\n")[2].partition("\n## ")[0]
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block.replace("77", str(WORDS.text.context_length)), namespace)
    assert namespace["text_embeds"].shape == (1, WORDS.embed_dim)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "release" / "README.md").read_text(), re.DOTALL)
    inputs = {"pixels": np.zeros((1, 8, 8, 3), np.float32), "ids": np.ones((1, 8), np.int32)}
    exec(code.replace("FOLDER", "release"), inputs)
    assert inputs["text_embeds"].shape == inputs["image_embeds"].shape == (1, WORDS.embed_dim)


def test_the_command_compares_tap_by_tap(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    artifact, out = tmp_path / "artifact", tmp_path / "release"
    same: dict[str, Any] = {"config": WORDS, "preprocess": Preprocess(8), "params": draw_params(WORDS, RULES["Q-ALL"])}
    write_artifact(artifact, **same, rules=(), rest_dtype="float32")
    assert main(["export", str(artifact), "--to", "litert", "--batch", "3", "--out", str(out)]) == 0
    for path in (out, out / "litert", out / "litert" / "text.tflite"):
        assert main(["compare", "activations", str(artifact), str(path)]) == 0
        shown = capfd.readouterr().out
        assert "19 taps within budget 0.1" in shown and "image.tflite and text.tflite" in shown
    assert main(["compare", "activations", str(out), str(artifact), "--budget", "1e-9"]) == 1
    assert "FAIL: first over budget 1e-09: image/" in capfd.readouterr().out
    assert main(["compare", "activations", str(artifact), str(tmp_path / "image.tflite")]) == 2


@pytest.mark.slow
def test_sizes_of_vit_b_16(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CLIPConfig.from_open_clip(PRESETS["ViT-B-16"])
    params = draw_params(config, RULES["Q-ALL"], deviation=0.03)
    begun = time.perf_counter()
    write(tmp_path, config, params)
    seconds = time.perf_counter() - begun
    verify_litert(tmp_path, params)
    image, text = ((tmp_path / f"{name}.tflite").stat().st_size for name in ("image", "text"))
    assert image <= 48.5e6 and text <= 33.8e6
    with capsys.disabled():
        print(f"\n{verify_embeddings(tmp_path, make_examples(config, params))}; written in {seconds:.1f} s")
        for path in sorted(tmp_path.iterdir()):
            print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {milliseconds(path):.0f} ms with 2 threads")


def milliseconds(path: pathlib.Path) -> float:
    """The shortest of ten runs on one image or text."""
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    session, times = interpreter.Interpreter(str(path), num_threads=2), []
    session.allocate_tensors()
    (given,) = session.get_input_details()
    session.set_tensor(given["index"], np.zeros(given["shape"], given["dtype"]))  # else token ids would be any number
    for _ in range(10):
        begun = time.perf_counter()
        session.invoke()
        times.append(time.perf_counter() - begun)
    return 1e3 * min(times)
