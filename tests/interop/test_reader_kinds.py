"""The error for a file that holds no weights names its kind; the files come from their own libraries, if installed."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pathlib
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable

import flax.serialization
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy
import zstandard
from etils import epath

from tclip_jax.cli import main
from tclip_jax.interop.reader import GGUF, PYTORCH, SAFETENSORS, file_kind
from tclip_jax.models.presets import PRESETS


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.bin"))
    return buffer.getvalue()


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


def parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), sink)
    return sink.getvalue().to_pybytes()


def onnx(producer: bytes = b"pytorch") -> bytes:
    """Return ir_version 8 and the producer's name, with which every ONNX export of PyTorch starts."""
    return b"\x08\x08\x12" + bytes([len(producer)]) + producer + b"\x1a\x052.7.0" + bytes(90)


KINDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "html": (lambda: b"\n<!DOCTYPE html>\n<html><head><title>404</title>", "a web page (HTML)"),
    "xml": (lambda: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "a web page (HTML)"),
    "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    "zip": (lambda: zipped("readme.txt"), "a zip archive: unpack it first"),
    "npz": (npz, "an archive of NumPy arrays (.npz)"),
    "npy": (lambda: b"\x93NUMPY\x01\x00" + bytes(70), "a NumPy array"),
    "flax": (lambda: flax.serialization.to_bytes({"text_model": {"a": np.zeros(3)}}), "parameters of Flax (msgpack)"),
    "keras": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file, of Keras or TensorFlow"),
    "onnx": (onnx, "an ONNX model"),
    "savedmodel": (lambda: b"\x08\x01\x12\xd5\x09\x0a\xd5" + bytes(90), "a SavedModel of TensorFlow"),
    "tflite": (lambda: b"\x1c\x00\x00\x00TFL3" + bytes(90), "a model of TensorFlow Lite"),
    "gzip": (lambda: gzip.compress(b"x" * 99), "a compressed file"),
    "xz": (lambda: lzma.compress(b"x" * 99), "a compressed file"),
    "bz2": (lambda: bz2.compress(b"x" * 99), "a compressed file"),
    "zst": (lambda: zstandard.compress(b"x" * 99), "a compressed file"),
    "tar": (tar, "a tar archive"),
    "parquet": (parquet, "a Parquet table"),
    "json": (lambda: b'{"error": "Entry not found"}', "JSON text"),
    "zeros": (lambda: bytes(4096), "only zeros"),
    "gguf": (lambda: b"GGUF" + struct.pack("<IQQ", 3, 0, 0), GGUF),
    "pickle": (lambda: pickle.dumps({"a": 1}), PYTORCH),
    "torch": (lambda: zipped("archive/data.pkl", "archive/version"), PYTORCH),
    "safetensors": (lambda: safetensors.numpy.save({"a": np.zeros(3)}), SAFETENSORS),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".gguf", ".h5", ""])
def test_a_file_is_said_to_be_what_it_is(
    name: str, suffix: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = KINDS[name]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(make())
    kind = file_kind(epath.Path(path))
    assert kind is not None and kind.startswith(words)
    assert main(["import", str(path), "--out", str(tmp_path / "out"), "--preset", "tiny"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error[:-1].isprintable() and path.name in error
    expected = {".safetensors": SAFETENSORS, ".bin": PYTORCH, ".gguf": GGUF}.get(suffix)
    assert words in error or words == expected, error
    assert not list(tmp_path.glob("out*"))


def test_random_bytes_are_not_guessed_at_and_not_printed(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"\x07\x1b[31mred\x1b[0m\xff" * 30)
    assert file_kind(epath.Path(path)) is None
    assert main(["import", str(path), "--out", str(tmp_path / "out"), "--preset", "tiny"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_names_of_a_file_are_not_sent_to_the_terminal(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.safetensors"
    names = ["\x1b[2Jvisual\n.proj", *"vwxyz"]  # as many as layers, or the check of the size fails
    safetensors.numpy.save_file({name: np.zeros(3, np.float32) for name in names}, path)
    assert main(["import", str(path), "--out", str(tmp_path / "out"), "--preset", "tiny"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error[:-1].isprintable() and r"\x1b[2Jvisual\n.proj" in error


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("adapter_config.json", "its adapter_config.json is an adapter (LoRA): merge it into its model"),
        ("flax_model.msgpack", "its flax_model.msgpack is weights of Flax"),
        ("tf_model.h5", "its tf_model.h5 is weights of Keras or TensorFlow"),
        ("saved_model.pb", "its saved_model.pb is a SavedModel of TensorFlow"),
        ("model.ckpt-1000.index", "its model.ckpt-1000.index is a checkpoint of TensorFlow"),
        ("model.onnx", "its model.onnx is an ONNX model"),
        ("model-f16.gguf", "its model-f16.gguf is a GGUF: pass that file instead of the folder"),
    ],
)
@pytest.mark.parametrize("described", [True, False])
def test_a_folder_without_weights_says_what_it_has(
    file: str, words: str, described: bool, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / file).write_text("{}")
    if described:
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": PRESETS["tiny"]}))
    assert main(["import", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", "an adapter (LoRA)"),
        ("visual.layer1.0.conv1.weight", "a ResNet"),
        ("visual.attn_pool.query", "a CoCa"),
        ("module.visual.trunk.stem.0.weight", "an image tower of timm"),
        ("text.transformer.embeddings.word_embeddings.weight", "a text tower of Hugging Face"),
        ("model.layers.0.mlp.gate_proj.weight", "a language model"),
    ],
)
def test_weights_of_another_kind_of_model(
    key: str, kind: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file({key: np.zeros(3, np.float32), "other": np.zeros(3, np.float32)}, path)
    assert main(["import", str(path), "--out", str(tmp_path / "out")]) == 2
    assert f"its weights are those of {kind}" in capsys.readouterr().err
