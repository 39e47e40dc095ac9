"""Texts of SigLIP: where open_clip, transformers and ours first differ, and commands that tokenize."""

from __future__ import annotations

import json
import pathlib

import jax
import pytest
from etils import epath
from PIL import Image

from tclip_jax.cli import main
from tclip_jax.data.images import Preprocess
from tclip_jax.inference.load import load_model
from tclip_jax.interop.export import export_model
from tclip_jax.interop.hugging_face_config import config_from_hugging_face
from tclip_jax.interop.metadata import HUGGING_FACE, OPEN_CLIP
from tclip_jax.interop.tokenizer_files import read_tokenizer
from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.numerics.inputs import inputs_report, sample_batch
from tests.small_tokenizers import CONTEXT, write_gemma

SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder of a small SigLIP, whose texts open_clip canonicalizes and transformers takes as they are."""
    folder = tmp_path_factory.mktemp("siglip") / "model"
    folder.mkdir()
    text = SMALL | {"vocab_size": write_gemma(folder), "max_position_embeddings": CONTEXT, "projection_size": 32}
    vision = SMALL | {"image_size": 16, "patch_size": 8}
    config = config_from_hugging_face({"model_type": "siglip", "vision_config": vision, "text_config": text})
    tokenizer = read_tokenizer(epath.Path(folder), HUGGING_FACE, config.text)
    params = init_params(CLIP(config), jax.random.key(0))
    pixels = Preprocess(16, (0.5,) * 3, (0.5,) * 3, resize_mode="squash")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    out = folder.parent / "exported"
    export_model(out, config=config, preprocess=pixels, params=params, tokenizer=tokenizer, formats=("hf",))
    for name, data in files.items():
        (out / name).write_bytes(data)
    document = json.loads((out / OPEN_CLIP).read_text())
    document["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    (out / OPEN_CLIP).write_text(json.dumps(document))
    return out


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_the_first_stage_that_differs_is_named(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = inputs_report(load_model(folder), folder)  # transformers' weights: its texts
    assert not report.passed
    assert [row.name for row in report.tables["inputs"] if not row.differ] == [
        "open_clip pixels",
        "transformers pixels",
        "transformers cleaning",
        "transformers tokens",
    ]
    assert "texts first differ from open_clip cleaning" in report.verdict
    assert any("'A Photo" in line for line in report.verdict)
    assert main(["compare", "inputs", str(folder)]) == 1
    assert "texts first differ from open_clip cleaning" in capsys.readouterr().out


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_other_padding_is_a_difference_of_tokens(folder: pathlib.Path) -> None:
    model = load_model(folder)
    path = folder / "tokenizer_config.json"
    stated = path.read_text()
    path.write_text(json.dumps(json.loads(stated) | {"padding_side": "left"}))
    report = inputs_report(model, folder)
    path.write_text(stated)
    assert "texts first differ from transformers tokens" in report.verdict


def test_activations_are_compared_on_texts(folder: pathlib.Path) -> None:
    model = load_model(folder)
    pixels, tokens = sample_batch(model, 3)
    assert pixels.shape == (3, 16, 16, 3) and tokens.shape == (3, CONTEXT) and tokens.max() < 400


def test_commands_tokenize_its_texts(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    main(["classify", str(folder), str(tmp_path / "red.png"), "--labels", "red,blue"])
    assert "red" in capsys.readouterr().out
    main(["evaluate", str(folder), "--data", "digits"])
    assert "digits" in capsys.readouterr().out
