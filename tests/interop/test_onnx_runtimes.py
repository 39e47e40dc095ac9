"""Exported ONNX files in the runtimes: embeddings of models with every option, in ONNX Runtime and OpenVINO."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tclip_jax.artifacts import write_artifact
from tclip_jax.cli import main
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.examples import Examples, make_examples
from tclip_jax.interop.export import export_model
from tclip_jax.interop.onnx import verify_embeddings, verify_onnx, write_onnx
from tclip_jax.interop.onnx_graph import Form
from tclip_jax.interop.onnx_session import run_onnx
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import PRESETS
from tests.interop.model_shapes import RULES, TEXT, VISION, clip_configs, draw_params

pytest.importorskip("onnx", reason="the onnx package is not installed (pip install -e '.[onnx]')")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install -e '.[onnx]')")
pytestmark = pytest.mark.runtimes

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = CLIPConfig(20, VISION, TEXT)
WORDS = dataclasses.replace(CONFIG, text=dataclasses.replace(TEXT, vocab_size=49408))  # of the tokenizer


def normalized(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def run(folder: pathlib.Path, tower: str, inputs: np.ndarray, suffix: str = "_q2") -> np.ndarray:
    name, output = {"image": ("vision", "image_embeds"), "text": ("text", "text_embeds")}[tower]
    (embeds,) = run_onnx((folder / f"{name}_model{suffix}.onnx").read_bytes(), tower, inputs, [output])
    return embeds


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=clip_configs(),
    rules=st.sampled_from(sorted(RULES)),
    packed=st.booleans(),
)
def test_every_option_of_the_towers(
    config: CLIPConfig,
    rules: str,
    packed: bool,
    tmp_path_factory: pytest.TempPathFactory,
    fast_compilation: None,
) -> None:
    folder, params = tmp_path_factory.mktemp("onnx"), draw_params(config, RULES[rules])
    form = Form(packed, accuracy_level=1)
    write_onnx(folder, config=config, preprocess=Preprocess(config.vision.image_size), params=params, form=form)
    verify_onnx(folder, config, params, form)
    verify_embeddings(folder, form, make_examples(config, params))


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return draw_params(CONFIG, RULES["Q-ALL"])


@pytest.fixture(scope="module")
def examples(params: dict[str, Any]) -> Examples:
    return make_examples(CONFIG, params, count=6)


def test_rounded_activations_stay_within_their_budget_and_float16_too(
    params: dict[str, Any], examples: Examples, tmp_path: pathlib.Path
) -> None:
    for form in (Form(), Form(dtype="float16"), Form(False, "float16")):
        write_onnx(tmp_path, config=CONFIG, preprocess=Preprocess(16), params=params, form=form)
        line = verify_embeddings(tmp_path, form, make_examples(CONFIG, params, dtype=form.dtype))
        assert "embeddings differ by at most" in line and "(onnxruntime " in line
    form = Form(accuracy_level=1)
    write_onnx(tmp_path, config=CONFIG, preprocess=Preprocess(16), params=params, form=form)
    with pytest.raises(ValueError, match="the difference must be at most 1e-05"):
        verify_embeddings(tmp_path, form, examples._replace(image=examples.image[::-1]))


def test_any_batch_and_a_shorter_padding(params: dict[str, Any], examples: Examples, tmp_path: pathlib.Path) -> None:
    write_onnx(tmp_path, config=CONFIG, preprocess=Preprocess(16), params=params, form=Form(accuracy_level=1))
    whole = run(tmp_path, "image", examples.pixels)
    np.testing.assert_allclose(run(tmp_path, "image", examples.pixels[:1]), whole[:1], rtol=0, atol=1e-5)
    end = CONFIG.text.vocab_size - 1
    tokens = np.array([[3, 4, end, 0, 0, 0, 0, 0], [5, end, 0, 0, 0, 0, 0, 0]])
    full = run(tmp_path, "text", tokens)
    # Tokenizers of transformers pad with the end of text, to the longest text of a batch.
    np.testing.assert_allclose(run(tmp_path, "text", np.where(tokens == 0, end, tokens)[:, :3]), full, atol=1e-5)
    np.testing.assert_allclose(run(tmp_path, "text", tokens[1:, :2]), full[1:], atol=1e-5)


def test_a_text_whose_padding_counts_must_fill_the_context(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(TEXT, pool_type="last"))
    params = draw_params(config, RULES["Q-ALL"])
    write_onnx(tmp_path, config=config, preprocess=Preprocess(16), params=params, form=Form())
    with pytest.raises(ValueError, match=r"onnxruntime .* input_ids"):
        run(tmp_path, "text", np.ones((1, 5), np.int64))


@pytest.mark.torch
def test_embeddings_are_those_of_transformers_before_normalisation(tmp_path: pathlib.Path) -> None:
    import torch
    import transformers

    config = CLIPConfig.from_open_clip(PRESETS["tiny"])
    params = draw_params(config, RULES["Q-ALL"])
    same: dict[str, Any] = {"config": config, "preprocess": Preprocess(32), "params": params}
    export_model(tmp_path / "out", **same, formats=["hf", "onnx"], accuracy_level=1)
    pixels = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    tokens = np.array([[49406, 320, 1125, 49407, 49407], [49406, 2368, 49407, 49407, 49407]])
    vision = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "out").eval()
    text = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        image_embeds = vision(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).image_embeds.numpy()
        text_embeds = text(torch.from_numpy(tokens)).text_embeds.numpy()
    np.testing.assert_allclose(run(tmp_path / "out" / "onnx", "image", pixels), image_embeds, rtol=0, atol=1e-4)
    np.testing.assert_allclose(run(tmp_path / "out" / "onnx", "text", tokens), text_embeds, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_openvino_with_static_shapes(dtype: str, quick_gelu: bool, tmp_path: pathlib.Path) -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed (pip install openvino)")
    config = dataclasses.replace(CONFIG, quick_gelu=quick_gelu)
    params = draw_params(config, RULES["Q-ALL"])
    form, examples = Form(dtype=dtype), make_examples(config, params, dtype=dtype)
    write_onnx(tmp_path, config=config, preprocess=Preprocess(16), params=params, form=form)
    ids = examples.tokens.astype(np.int64)
    feeds = {
        "vision": ({"pixel_values": np.ascontiguousarray(examples.pixels.transpose(0, 3, 1, 2))}, examples.image),
        "text": ({"input_ids": ids, "attention_mask": np.ones_like(ids)}, examples.text),
    }
    for name, (feed, expected) in feeds.items():
        model = openvino.Core().read_model(tmp_path / f"{name}_model{form.suffix}.onnx")
        model.reshape({key: list(value.shape) for key, value in feed.items()})
        # It does not round activations, whatever the accuracy level of the file.
        compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        np.testing.assert_allclose(normalized(compiled(feed)[0]), expected, rtol=0, atol=1e-5)


def test_the_code_of_the_page_and_of_the_card_runs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same: dict[str, Any] = {"config": WORDS, "preprocess": Preprocess(16), "params": draw_params(WORDS, RULES["Q-ALL"])}
    export_model(tmp_path / "release", **same, formats=["onnx"], accuracy_level=1)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8").partition("\n## LiteRT\n")[0]
    namespace: dict[str, Any] = {}
    section = page.partition("\n## ONNX\n")[2].partition("\n## ")[0]
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(block, namespace)
    assert namespace["text_embeds"].shape == (2, WORDS.embed_dim)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "release" / "README.md").read_text(), re.DOTALL)
    inputs = {"pixels": np.zeros((1, 3, 16, 16), np.float32), "ids": np.ones((1, 4), np.int64)}
    inputs["mask"] = inputs["ids"]
    exec(code.replace("FOLDER", "release"), inputs)
    assert inputs["text_embeds"].shape == inputs["image_embeds"].shape == (1, WORDS.embed_dim)


@pytest.mark.slow
def test_sizes_of_vit_b_16(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CLIPConfig.from_open_clip(PRESETS["ViT-B-16"])
    params = draw_params(config, RULES["Q-ALL"], deviation=0.03)
    for dtype, image, both in (("float32", 30e6, 50e6), ("float16", 26e6, 44e6)):
        form = Form(dtype=dtype)
        write_onnx(tmp_path, config=config, preprocess=Preprocess(224), params=params, form=form)
        verify_onnx(tmp_path, config, params, form)
        sizes = [(tmp_path / f"{name}_model{form.suffix}.onnx").stat().st_size for name in ("vision", "text")]
        assert sizes[0] <= image and sum(sizes) <= both
        with capsys.disabled():
            print(f"\n{verify_embeddings(tmp_path, form, make_examples(config, params, dtype=dtype))}")


def test_the_command_compares_with_each_kind_of_file(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact, out = tmp_path / "artifact", tmp_path / "release"
    same: dict[str, Any] = {"config": WORDS, "preprocess": Preprocess(16), "params": draw_params(WORDS, RULES["Q-ALL"])}
    write_artifact(artifact, **same, rules=(), rest_dtype="float32")
    assert main(["export", str(artifact), "--to", "onnx,onnx-fp32,open_clip", "--out", str(out)]) == 0
    compare = ["compare", "activations", str(artifact)]
    assert main([*compare, str(out / "onnx")]) == 0
    assert "taps within budget 0.1" in capsys.readouterr().out
    assert main([*compare, str(out / "onnx"), "--budget", "1e-9"]) == 1
    assert "FAIL: first over budget 1e-09: image/" in capsys.readouterr().out
    assert main([*compare, str(out / "onnx" / "text_model.onnx")]) == 0
    shown = capsys.readouterr().out
    assert "taps within budget 2e-05" in shown and "vision_model.onnx and text_model.onnx" in shown
    # The weights of PyTorch come first in the whole folder, and without PyTorch JAX runs them.
    assert main([*compare, str(out)]) == 0
    runner = "open_clip on PyTorch" if importlib.util.find_spec("torch") else "JAX"
    assert f"reference run by: {runner}" in capsys.readouterr().out
    # ONNX is the reference in either position.
    assert main(["compare", "activations", str(out / "onnx"), str(artifact)]) == 0


def test_a_folder_that_was_not_exported_here_is_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "activations", str(tmp_path), str(tmp_path / "none.onnx")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
