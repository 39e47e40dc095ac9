"""docs/ternary-from.md with small models of both families: import, train, evaluate, compare, export."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from tclip_jax.artifacts.format import read_artifact
from tclip_jax.cli import main
from tclip_jax.data.images import Preprocess
from tclip_jax.evaluation.retrieval import retrieval_recall
from tclip_jax.inference.classify import Guess, classify_images
from tclip_jax.inference.model import Model
from tclip_jax.interop.export import export_model
from tclip_jax.interop.hugging_face_config import config_from_hugging_face
from tclip_jax.interop.metadata import HUGGING_FACE, OPEN_CLIP
from tclip_jax.interop.tokenizer_files import read_tokenizer
from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.ternary import TernaryTensor
from tests.small_tokenizers import CONTEXT, write_gemma

pytestmark = [pytest.mark.slow, pytest.mark.torch]

TOWER = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}


def write_source(family: str, folder: pathlib.Path) -> None:
    """A folder of transformers with a model of random weights and its tokenizer."""
    tokenizer = None
    if family == "clip":
        vision = VisionConfig((32, 32), 8, 32, 1, 16)
        config = CLIPConfig(32, vision, TextConfig(context_length=CONTEXT, width=32, heads=2, layers=1))
    else:
        files = folder.with_name("tokenizer")
        files.mkdir()
        text = TOWER | {"vocab_size": write_gemma(files), "max_position_embeddings": CONTEXT, "projection_size": 32}
        vision_config = TOWER | {"image_size": 32, "patch_size": 8}
        document = {"model_type": "siglip", "vision_config": vision_config, "text_config": text}
        config = config_from_hugging_face(document)
        tokenizer = read_tokenizer(epath.Path(files), HUGGING_FACE, config.text)
    params = jax.device_get(jax.jit(init_params, static_argnums=0)(CLIP(config), jax.random.key(0)))
    pixels = Preprocess(32, (0.5,) * 3, (0.5,) * 3, resize_mode="squash")
    export_model(folder, config=config, preprocess=pixels, params=params, tokenizer=tokenizer, formats=("hf",))
    (folder / OPEN_CLIP).unlink()  # transformers has no such file


def tclip(*arguments: str | pathlib.Path) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_walk(family: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, model, run, packed = (tmp_path / name for name in ("source", "model", "run", "packed"))
    write_source(family, source)
    tclip("import", source, "--out", model)
    tclip("compare", "activations", model, source)
    tclip("compare", "inputs", source)
    tclip("train", "--config", f"ternary_from:{model},runlocal", "--workdir", run)
    tclip("pack", run, "--out", packed)
    for name in ("model", "packed"):
        tclip("evaluate", tmp_path / name, "--data", "digits", "--out", tmp_path / "results" / name)
    tclip("evaluate", "compare", tmp_path / "results" / "model", tmp_path / "results" / "packed")
    formats = "open_clip,hf" if family == "clip" else "hf"  # timm has no image tower of this shape
    tclip("export", packed, "--to", formats, "--out", tmp_path / "release")
    tclip("compare", "activations", packed, tmp_path / "release")
    if family == "clip":
        tclip("compare", "inputs", tmp_path / "release")
    if family == "siglip":
        tclip("export", packed, "--to", "big_vision", "--out", tmp_path / "npz")
        configuration = str(tmp_path / "npz" / "open_clip_config.json")
        npz, again = tmp_path / "npz" / "big_vision.npz", tmp_path / "again"
        tclip("import", npz, "--model-cfg", configuration, "--tokenizer", packed, "--out", again)
        tclip("compare", "weights", packed, again)
        tclip("compare", "activations", packed, again)
    picture = tmp_path / "grey.png"
    Image.new("RGB", (40, 30), "grey").save(picture)
    capsys.readouterr()
    tclip("classify", packed, picture, "--labels", "one,two", "--json")
    (guess,) = json.loads(capsys.readouterr().out)
    shares = list(guess["labels"].values())
    assert sum(shares) == pytest.approx(1) if family == "clip" else all(0 < share < 0.5 for share in shares)
    leaves = read_artifact(packed).params["image"]["blocks"]["mlp"]
    assert isinstance(leaves["fc1"]["kernel"], TernaryTensor)


def test_zero_shot_and_recall_of_a_siglip_are_those_of_transformers(tmp_path: pathlib.Path) -> None:
    """Pictures and texts go through each library's own preprocessing and tokenizer."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    write_source("siglip", tmp_path / "source")
    tclip("import", tmp_path / "source", "--out", tmp_path / "model")
    model = Model.load(tmp_path / "model")
    model = dataclasses.replace(model, params=model.params | {"logit_bias": np.float32(-1.0)})
    labels = ["a photo of a Dog.", "two red houses, near a cat", "rain!", "o'clock", "the small brown dogs"]
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)) for _ in range(8)]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    guesses = classify_images(model, [str(tmp_path / f"{i}.png") for i in range(8)], labels, ["{c}"])
    theirs = transformers.SiglipModel.from_pretrained(tmp_path / "source").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "source")
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path / "source", backend="pil")
    options = {"padding": "max_length", "max_length": CONTEXT, "truncation": True, "return_tensors": "pt"}
    with torch.no_grad():
        theirs.logit_bias.fill_(-1.0)
        inputs = {"input_ids": tokenizer(labels, **options).input_ids, **pixels(pictures, return_tensors="pt")}
        logits = theirs(**inputs).logits_per_image
    for guess, row in zip(guesses, torch.sigmoid(logits).numpy(), strict=True):
        assert isinstance(guess, Guess)
        assert [guess.labels[label] for label in labels] == pytest.approx(row, abs=1e-5)
    image, text = model.encode_image(pictures), model.encode_text(labels)
    pictured = np.array([0, 3, 4, 6, 7])  # the picture of each label
    recall = retrieval_recall(image, text, pictured, ks=(2,))
    best = np.argsort(-logits.numpy(), axis=0)[:2]
    assert recall["image_retrieval_recall@2"] == np.mean([i in best[:, j] for j, i in enumerate(pictured)])
