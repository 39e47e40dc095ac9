"""A run whose texts CLIP's own tokenizer does not read: where its tokenizer comes from, and that it stays the same."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil

import ml_collections
import numpy as np
import pytest

from tclip_jax.cli import main
from tclip_jax.data.file_tokenizer import FileTokenizer
from tclip_jax.data.tokenizer import Tokenizer
from tclip_jax.inference.load import load_model, load_tokenizer
from tclip_jax.inference.model import Model
from tclip_jax.runs.config import run_config
from tclip_jax.runs.record import last_record
from tclip_jax.training.loop import train
from tclip_jax.training.teacher_cache import open_cache, write_cache
from tclip_jax.training.tokenizer import check_teacher_tokenizer, run_tokenizer
from tests.small_tokenizers import CONTEXT, captions, write_gemma, write_spiece


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "gemma").mkdir()
    return tmp_path / "gemma"


@pytest.fixture
def siglip(config: ml_collections.ConfigDict, folder: pathlib.Path) -> ml_collections.ConfigDict:
    """The small run, with texts of a small Gemma tokenizer."""
    size = write_gemma(folder)
    text = {"context_length": CONTEXT, "vocab_size": size, "hf_tokenizer_name": "org/small"}
    config.model.text_cfg.update(text)
    config.steps, config.data.tokenizer = 2, str(folder)
    return config


@pytest.mark.slow
def test_a_run_keeps_its_tokenizer(
    siglip: ml_collections.ConfigDict, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    texts, workdir = list(captions()[:50]), tmp_path / "run"
    siglip.eval.source, siglip.eval.every = "digits", 2
    model = train(siglip, workdir)
    ids = model.tokenize(texts)
    assert model.tokenizer and last_record(workdir)["data"]["tokenizer"] == model.tokenizer.digest
    shutil.rmtree(folder)  # as on another machine
    np.testing.assert_array_equal(load_model(workdir).tokenize(texts), ids)
    siglip.steps = 3
    np.testing.assert_array_equal(train(siglip, workdir).tokenize(texts), ids)
    main(["pack", str(workdir), "--out", str(tmp_path / "artifact")])
    np.testing.assert_array_equal(Model.load(tmp_path / "artifact").tokenize(texts), ids)
    # A run that starts from it has its tokenizer.
    for source in (workdir, tmp_path / "artifact"):
        siglip.data.tokenizer, siglip.init = "", str(source)
        assert run_tokenizer(run_config(siglip)) == model.tokenizer


def test_another_tokenizer_is_never_used(
    siglip: ml_collections.ConfigDict, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / "run"
    train(siglip, workdir)
    write_gemma(folder, padding_side="left")
    run = run_config(siglip)
    with pytest.raises(ValueError, match=r"config\.data\.tokenizer .* has another tokenizer than .*run/tokenizer"):
        run_tokenizer(run, workdir)
    shutil.move(workdir / "tokenizer", tmp_path / "kept")
    with pytest.raises(ValueError, match="run: this run has used another tokenizer"):
        run_tokenizer(run, workdir)
    shutil.move(tmp_path / "kept", workdir / "tokenizer")
    shutil.rmtree(folder)
    data = (workdir / "tokenizer" / "tokenizer.json").read_bytes()
    (workdir / "tokenizer" / "tokenizer.json").write_bytes(data.replace(b"<mask>", b"<task>"))
    with pytest.raises(
        ValueError, match=r"tokenizer\.json is damaged: its bytes do not have the sha256 in options\.json"
    ):
        run_tokenizer(run, workdir)
    (workdir / "tokenizer" / "options.json").write_text("[]")
    with pytest.raises(ValueError, match=r"options\.json does not describe a tokenizer"):
        load_model(workdir)


def test_without_a_tokenizer_the_run_says_what_to_set(
    siglip: ml_collections.ConfigDict, tmp_path: pathlib.Path
) -> None:
    siglip.data.tokenizer = ""
    with pytest.raises(ValueError, match=r"tokenized by 'org/small', which none of .*: set config\.data\.tokenizer to"):
        train(siglip, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    siglip.data.tokenizer = str(tmp_path / "gemma")
    siglip.model.text_cfg.vocab_size += 1
    with pytest.raises(ValueError, match="tokens, but the model's embedding"):
        train(siglip, tmp_path / "run")


@pytest.mark.slow
def test_a_teacher_reads_the_same_tokens(
    siglip: ml_collections.ConfigDict, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    teacher = tmp_path / "teacher"
    train(siglip, teacher)
    siglip.data.tokenizer, siglip.teacher, siglip.loss.fd = "", str(teacher), 1.0
    student = train(siglip, tmp_path / "student")
    assert student.tokenizer == load_model(teacher).tokenizer
    write_gemma(folder, padding_side="left")
    siglip.data.tokenizer = str(folder)
    with pytest.raises(
        ValueError, match=r"the teacher .* has another tokenizer than the model \(\{.*: they must be equal"
    ):
        train(siglip, tmp_path / "other")
    text = run_config(siglip).model.text
    with pytest.raises(
        ValueError, match="the teacher x has another tokenizer than the model: they read the same tokens"
    ):
        check_teacher_tokenizer("x", text, None, Tokenizer(CONTEXT))
    siglip.teacher, siglip.data.tokenizer, siglip.loss.fd, siglip.loss.task = "", "", 0.0, 1.0
    run = run_config(siglip)
    assert isinstance(run_tokenizer(run, teacher=str(teacher)), FileTokenizer)
    assert isinstance(run_tokenizer(dataclasses.replace(run, teacher="any"), teacher=str(teacher)), FileTokenizer)


def test_a_teacher_cache_is_keyed_by_the_tokenizer(
    siglip: ml_collections.ConfigDict, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    teacher, cache = tmp_path / "teacher", tmp_path / "cache"
    train(siglip, teacher)
    siglip.data.teacher_cache, siglip.loss.fd = str(cache), 1.0
    run = run_config(siglip)
    write_cache(cache, run, str(teacher), copies=1)
    open_cache(run, tokenizer=run_tokenizer(run))
    write_gemma(folder, padding_side="left")
    with pytest.raises(ValueError, match=r"the teacher's inputs differ .*tokenizer"):
        open_cache(run, tokenizer=run_tokenizer(run))
    with pytest.raises(ValueError, match=r"teacher .* has another tokenizer than the model"):
        write_cache(tmp_path / "again", run, str(teacher), copies=1)


@pytest.mark.slow
def test_a_run_with_a_spiece_model(siglip: ml_collections.ConfigDict, tmp_path: pathlib.Path) -> None:
    (tmp_path / "spiece").mkdir()
    siglip.model.text_cfg.vocab_size = write_spiece(tmp_path / "spiece")
    siglip.data.tokenizer, siglip.data.workers = str(tmp_path / "spiece"), 1
    model = train(siglip, tmp_path / "run")
    assert load_tokenizer(tmp_path / "run", model.config.text) == model.tokenizer
