"""`tclip export` writes every format at once, with the check script, and each format gives the same trits."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import pathlib
import runpy
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from tclip_jax.artifacts import pack_params, read_artifact, write_artifact
from tclip_jax.artifacts.pack import flatten
from tclip_jax.cli import main
from tclip_jax.data.images import Preprocess
from tclip_jax.inference.load import load_model, load_packed
from tclip_jax.interop.export import export_model
from tclip_jax.interop.latent import latent_params
from tclip_jax.interop.model_card import model_card
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.numerics.weights import weights_report
from tclip_jax.runs.checkpoints import CheckpointConfig, Checkpoints
from tclip_jax.runs.config import base_config, run_config
from tclip_jax.ternary import Quantizer, TernaryTensor

Params = dict[str, Any]
Draw = Callable[[CLIPConfig], Params]

CONFIG = CLIPConfig(
    embed_dim=32,
    vision=VisionConfig(image_size=(32, 32), patch_size=16, width=256, layers=2),
    text=TextConfig(context_length=12, width=256, heads=4, layers=1),
    quick_gelu=True,
)
FORMATS = "open_clip,hf,gguf-tq1_0,gguf-tq2_0"
FIGURES = {"zero_shot_accuracy": 0.987654321, "imagenet": {"acc1": 0.5, "classes": 1000}, "a|b": "one\ntwo"}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, random_params: Draw) -> pathlib.Path:
    """A ternary artifact with figures, whose groups of 256 and scales of 8 bits suit every format."""
    folder = tmp_path_factory.mktemp("release") / "student"
    rules = ternary_rules("Q-ALL", Quantizer())
    params = pack_params(random_params(CONFIG), rules)
    fields = {"config": CONFIG, "preprocess": Preprocess(32), "rules": rules, "rest_dtype": "float32"}
    write_artifact(folder, params=params, figures=FIGURES, **fields)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def release(student: pathlib.Path) -> pathlib.Path:
    """The student, exported in every format; tests must not change it."""
    folder = student.parent / "release"
    assert main(["export", str(student), "--to", FORMATS, "--out", str(folder)]) == 0
    return folder


def run_check(folder: pathlib.Path) -> Any:
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(folder / "check.py"), run_name="__main__")
    return done.value.code


def test_files_of_a_release(release: pathlib.Path) -> None:
    assert {path.name for path in release.iterdir()} == {
        *("open_clip_config.json", "open_clip_model.safetensors", "config.json", "model.safetensors"),
        *("release-tq1_0.gguf", "release-tq2_0.gguf", "check.py", "check.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
        "preprocessor_config.json",
    }


def test_the_card_has_the_figures_of_the_artifact(release: pathlib.Path) -> None:
    card = (release / "README.md").read_text()
    rows = (
        "| zero_shot_accuracy | 0.987654 |\n| imagenet.acc1 | 0.5 |\n| imagenet.classes | 1000 |\n| a\\|b | one two |\n"
    )
    assert "| measured | |\n|---|---|\n" + rows in card
    assert "`python check.py`" in card


@pytest.mark.parametrize(
    ("formats", "header", "absent"),
    [
        (["open_clip", "hf"], "library_name: open_clip\nX\ntags: [clip, ternary, open_clip, transformers]", ["gguf"]),
        (["hf"], "library_name: transformers\nX\ntags: [clip, ternary, transformers]", ["open_clip", "gguf"]),
        (["open_clip"], "library_name: open_clip\nX\ntags: [clip, ternary, open_clip]", ["transformers", "gguf"]),
        (["gguf-tq1_0"], "X\ntags: [clip, ternary, gguf]", ["open_clip", "transformers", "safetensors", "float32"]),
    ],
)
def test_the_card_names_only_what_was_exported(
    formats: list[str], header: str, absent: list[str], student: pathlib.Path
) -> None:
    card = model_card(load_packed(student).params, "float32", {}, formats)
    header = header.replace("X", "pipeline_tag: zero-shot-image-classification")
    assert card.startswith(f"---\n{header}\n---\n# Ternary CLIP\n")
    assert not any(word in card.lower() for word in absent)
    assert "of them are ternary" in card and ("2 of 255" in card) is ("hf" in formats)


@pytest.mark.torch
def test_the_pixels_of_the_other_backend_differ_as_the_card_says(release: pathlib.Path) -> None:
    import transformers

    rng = np.random.default_rng(0)
    sizes = ((48, 64), (500, 375), (300, 200), (33, 90))
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]
    pil, other = (
        transformers.CLIPProcessor.from_pretrained(release, **backend).image_processor(images, return_tensors="np")
        for backend in ({"backend": "pil"}, {})
    )
    spread = 255 * np.array(Preprocess(32).std)[:, None, None]
    differences = spread * np.abs(np.asarray(pil["pixel_values"]) - np.asarray(other["pixel_values"]))
    assert 0 < differences.max() < 2.01 and differences.mean() < 0.01
    assert "usually pixels by up to 2 of 255" in (release / "README.md").read_text()


@pytest.mark.torch
def test_the_check_script_reports_a_library_that_cannot_be_imported(
    release: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.import_module

    def without_open_clip(name: str, package: str | None = None) -> Any:
        if name == "open_clip":
            raise RuntimeError("operator torchvision::nms\ndoes not exist")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without_open_clip)
    assert run_check(release) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "open_clip cannot be imported: RuntimeError('operator torchvision::nms\\ndoes not exist')"
    assert [line.split()[0] for line in lines[1:]] == ["transformers", "transformers"]


@pytest.mark.torch
def test_the_check_script(release: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check(release) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["open_clip image", "open_clip text", "transformers image", "transformers text"]
    assert [line.partition(" embeddings: max |difference| ")[0] for line in lines] == names
    assert all(float(line.split()[-1]) <= 1e-5 for line in lines)

    broken = pathlib.Path(shutil.copytree(release, tmp_path / "broken"))
    state = safetensors.numpy.load_file(broken / "model.safetensors")
    state["text_model.encoder.layers.0.mlp.fc2.bias"][3] += 0.5
    safetensors.numpy.save_file(state, broken / "model.safetensors", {"format": "pt"})
    assert run_check(broken) == "not the exported model, or no library"
    (broken / "model.safetensors").unlink()
    assert run_check(broken) == 0  # only open_clip's weights
    (broken / "open_clip_model.safetensors").unlink()
    assert run_check(broken) == "not the exported model, or no library"


@pytest.mark.torch
def test_the_check_script_of_half_precision(tmp_path: pathlib.Path, random_params: Draw) -> None:
    small = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, vocab_size=300))
    source, out = str(tmp_path / "artifact"), tmp_path / "half"
    write_artifact(source, config=small, preprocess=Preprocess(32), params=random_params(small), rules=())
    assert main(["export", source, "--to", "open_clip", "--dtype", "bfloat16", "--out", str(out)]) == 0
    assert run_check(out) == 0


@pytest.mark.torch
def test_average_pooling_and_layer_scale_are_for_open_clip_alone(
    student: pathlib.Path, tmp_path: pathlib.Path, random_params: Draw, capsys: pytest.CaptureFixture[str]
) -> None:
    text = dataclasses.replace(CONFIG.text, vocab_size=300, ls_init_value=0.2, pool_type="last", no_causal_mask=True)
    vision = dataclasses.replace(
        CONFIG.vision, pool_type="avg", ls_init_value=0.1, no_ln_pre=True, final_ln_after_pool=True
    )
    config = dataclasses.replace(CONFIG, vision=vision, text=text)
    source = tmp_path / "artifact"
    fields: dict[str, Any] = {"config": config, "preprocess": Preprocess(32), "rules": ()}
    write_artifact(source, params=random_params(config), **fields)
    assert main(["export", str(source), "--to", "open_clip", "--out", str(tmp_path / "out")]) == 0
    assert run_check(tmp_path / "out") == 0
    for formats, library in (("open_clip,hf", "transformers' CLIPModel"), ("open_clip,gguf-tq1_0", "")):
        assert main(["export", str(source), "--to", formats, "--out", str(tmp_path / "no")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and library in error
    assert not list(tmp_path.glob("no*"))


def copied(release: pathlib.Path, folder: pathlib.Path, *names: str) -> pathlib.Path:
    folder.mkdir()
    for name in names:
        shutil.copy(release / name, folder / name)
    return folder


def assert_same_trits(actual: Params, expected: Params, exact_floats: bool = True) -> None:
    ours, theirs = flatten(actual), flatten(expected)
    count = 0
    for path, leaf in theirs.items():
        if isinstance(leaf, TernaryTensor):
            np.testing.assert_array_equal(ours[path].trits, leaf.trits, err_msg=path)
            assert np.asarray(ours[path].scale).tobytes() == np.asarray(leaf.scale).tobytes(), path
            count += 1
        elif exact_floats:
            assert np.asarray(ours[path]).tobytes() == np.asarray(leaf).tobytes(), path
    assert count == 9


@pytest.mark.parametrize("kind", ["open_clip", "hf", "tq1_0", "tq2_0", "float16", "bfloat16"])
def test_the_same_trits_out_of_every_format(
    kind: str, student: pathlib.Path, release: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    if kind == "open_clip":
        source = copied(release, tmp_path / kind, "open_clip_config.json", "open_clip_model.safetensors")
    elif kind == "hf":
        files = ("config.json", "preprocessor_config.json", "model.safetensors")
        source = copied(release, tmp_path / kind, *files)
    elif kind.startswith("tq"):
        source = release / f"release-{kind}.gguf"
    else:
        source, (_, preprocess, params, *_) = tmp_path / kind, read_artifact(student)
        fields: dict[str, Any] = {"config": CONFIG, "preprocess": preprocess, "params": params}
        export_model(source, **fields, formats=["open_clip"], dtype=kind)
    assert main(["import", str(source), "--out", str(tmp_path / "imported")]) == 0
    artifact, original = read_artifact(tmp_path / "imported"), read_artifact(student)
    assert (artifact.config, artifact.preprocess) == (original.config, original.preprocess)
    assert_same_trits(artifact.params, original.params, exact_floats="float" not in kind)


def test_an_export_of_an_import_has_the_same_bytes(release: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert main(["import", str(release), "--out", str(tmp_path / "imported")]) == 0
    again = tmp_path / "release"
    assert main(["export", str(tmp_path / "imported"), "--to", FORMATS, "--out", str(again)]) == 0
    assert {path.name for path in again.iterdir()} == {path.name for path in release.iterdir()}
    for path in release.iterdir():
        if path.name != "README.md":  # it contains the figures of the artifact
            assert path.read_bytes() == (again / path.name).read_bytes(), path.name


@pytest.fixture(scope="module")
def kinds(student: pathlib.Path, release: pathlib.Path) -> dict[str, pathlib.Path]:
    """The same weights in every form that `tclip compare` accepts."""
    workdir = student.parent / "run"
    config = base_config()
    with config.unlocked():
        config.update({"model": CONFIG.to_open_clip(), "ternary": "Q-ALL"})
    run = run_config(config)
    latent = latent_params(read_artifact(student).params, run.rules)
    with Checkpoints(workdir / "checkpoints", CheckpointConfig()) as checkpoints:
        checkpoints.save(1, {"params": jax.tree.map(jax.numpy.asarray, latent)}, {})
    (workdir / "config.json").write_text(config.to_json())
    files = ("config.json", "preprocessor_config.json", "model.safetensors")
    return {
        "run": workdir,
        "artifact": student,
        "open_clip folder": release,
        "open_clip file": release / "open_clip_model.safetensors",
        "transformers folder": copied(release, student.parent / "hf", *files),
        "GGUF": release / "release-tq1_0.gguf",
    }


@pytest.mark.slow
def test_compare_takes_any_two_kinds(
    kinds: dict[str, pathlib.Path], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = tmp_path / "model.json"
    named.write_text(json.dumps(CONFIG.to_open_clip()))
    models = {kind: load_model(path, like=str(named)) for kind, path in kinds.items()}
    for (a, ours), (b, theirs) in itertools.combinations(models.items(), 2):
        report = weights_report("", ours, theirs)
        assert report.passed and report.verdict == ("0 of 50 tensors over budget 0, 0 trit flips",), (a, b)
    paths = [str(kinds["open_clip file"]), str(kinds["run"])]
    assert main(["compare", "weights", *paths]) == 2
    assert "does not state its architecture" in capsys.readouterr().err
    assert main(["compare", "weights", *paths, "--model-cfg", str(named)]) == 0
    paths[1] = str(kinds["GGUF"])
    assert main(["compare", "activations", *paths, "--model-cfg", str(named), "--via", "jax", "--batch", "1"]) == 0
