"""The readers of files: how valid files are made, how all of them is read, and which of them are changed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import safetensors.numpy

from tclip_jax.artifacts.format import read_artifact, write_artifact
from tclip_jax.artifacts.pack import pack_params
from tclip_jax.artifacts.safetensors import read_safetensors
from tclip_jax.data.images import Preprocess
from tclip_jax.data.sources import base, open_source
from tclip_jax.data.sources.shard_index import ShardIndex
from tclip_jax.interop import litert
from tclip_jax.interop.big_vision import to_big_vision, write_big_vision
from tclip_jax.interop.checkpoints import open_checkpoint
from tclip_jax.interop.export import export_model
from tclip_jax.interop.gguf import read_gguf, write_gguf
from tclip_jax.interop.litert_flatbuffer import Flatbuffer
from tclip_jax.interop.litert_integers import Integers, decode_integers
from tclip_jax.interop.onnx import read_metadata, read_quantized, write_onnx
from tclip_jax.interop.onnx_graph import Form
from tclip_jax.interop.torchscript import read_torchscript, torchscript_activation
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import MLP, input_axis, matrix_shape
from tclip_jax.numerics.golden import Recording, read_golden, write_golden
from tclip_jax.recipes import load_recipe, override
from tclip_jax.runs.config import run_config
from tclip_jax.ternary import Quantizer, TernaryTensor
from tests import siglip

CONFIG = CLIPConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=(16, 16), patch_size=8, width=64, layers=1),
    text=TextConfig(context_length=8, vocab_size=49408, width=16, heads=1, layers=1),
)
SMALL = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, vocab_size=50))
WIDE = dataclasses.replace(
    CONFIG,
    vision=dataclasses.replace(CONFIG.vision, width=256, mlp_ratio=1.0),
    text=dataclasses.replace(CONFIG.text, vocab_size=50, width=256, mlp_ratio=1.0),
)


@dataclasses.dataclass
class Reader:
    """A reader and its valid files.

    Attributes:
      prepare: writes them into an empty folder.
      read: all of them, every array too.
      files: what is changed, one at a time: name -> how a document becomes the file, or None of plain bytes.
      accept: called with the folder and the changed file, to make good what stands elsewhere (a checksum).
    """

    prepare: Callable[[pathlib.Path], None]
    read: Callable[[pathlib.Path], Any]
    files: dict[str, tuple[Callable[[bytes], Any], Callable[[bytes, bytes], bytes]] | None]
    accept: Callable[[pathlib.Path, str], None] = lambda folder, name: None


def params(config: CLIPConfig, ternary: str | None = None) -> dict[str, Any]:
    """Small numbers; the MLPs of the blocks ternary if asked for, in groups of 256 or of a row."""
    rng = np.random.default_rng(0)

    def leaf(key_path: Any, shape: Any) -> Any:
        path = "/".join(key.key for key in key_path)
        if ternary and "/mlp/" in path and path.endswith("kernel"):
            size, axis = matrix_shape(shape.shape), input_axis(path)
            scale = list(size)
            scale[axis] = 1
            trits = rng.integers(-1, 2, size, np.int8)
            return TernaryTensor(trits, np.full(scale, 0.5, np.float32), size[axis], axis)
        return rng.standard_normal(shape.shape, np.float32)

    return jax.tree_util.tree_map_with_path(leaf, param_shapes(config))


def whole(data: bytes) -> Any:
    return json.loads(data)


def as_it_is(old: bytes, text: bytes) -> bytes:
    return text


JSON_FILE = (whole, as_it_is)


def header_of(data: bytes) -> Any:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def with_header(old: bytes, text: bytes) -> bytes:
    """A safetensors file with another header, whose length is right."""
    return struct.pack("<Q", len(text)) + text + old[8 + int.from_bytes(old[:8], "little") :]


SAFETENSORS = (header_of, with_header)


def _safetensors() -> Reader:
    def prepare(folder: pathlib.Path) -> None:
        arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.ones(4, np.float16), "d": np.float64(2)}
        safetensors.numpy.save_file({k: np.asarray(v) for k, v in arrays.items()}, folder / "w.safetensors")

    def read(folder: pathlib.Path) -> None:
        for value in read_safetensors(folder / "w.safetensors").values():
            np.asarray(value)

    return Reader(prepare, read, {"w.safetensors": SAFETENSORS})


def _manifest() -> Reader:
    def prepare(folder: pathlib.Path) -> None:
        rules = ((MLP, Quantizer()), ("i.*", Quantizer(kind="uniform", bits=4)), (".*", Quantizer(kind="uniform")))
        same: dict[str, Any] = {"config": SMALL, "params": pack_params(params(SMALL), rules), "rules": rules}
        write_artifact(folder / "a", **same, preprocess=Preprocess(16))

    def sign(folder: pathlib.Path, name: str) -> None:
        """Checksums that fit, of every second input, so that what they protect is reached."""
        path = folder / "a" / "tclip.json"
        data = path.read_bytes()
        if hashlib.sha256(data).digest()[0] % 2 and name == "a/tclip.json":
            return
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError, AttributeError):
            fields = json.loads(data)
            if name != "a/tclip.json":
                changed = (folder / name).read_bytes()
                fields["files"][name[2:]] = {"bytes": len(changed), "sha256": hashlib.sha256(changed).hexdigest()}
            text = json.dumps(fields | {"sha256": "0" * 64})
            digest = hashlib.sha256(text.encode()).hexdigest()
            path.write_text(digest.join(text.rsplit("0" * 64, 1)))

    files = {"a/tclip.json": JSON_FILE, "a/ternary.safetensors": SAFETENSORS, "a/rest.safetensors": SAFETENSORS}
    return Reader(prepare, lambda folder: read_artifact(folder / "a"), files, sign)


def _gguf() -> Reader:
    def prepare(folder: pathlib.Path) -> None:
        write_gguf(folder / "m.gguf", config=WIDE, preprocess=Preprocess(16), params=params(WIDE, "row"), kind="tq2_0")

    return Reader(prepare, lambda folder: read_gguf(folder / "m.gguf"), {"m.gguf": None})


def _big_vision() -> Reader:
    config = dataclasses.replace(
        SMALL,
        embed_dim=64,
        vision=dataclasses.replace(SMALL.vision, **siglip.VISION),
        text=dataclasses.replace(SMALL.text, **siglip.TEXT),
    )

    return Reader(
        lambda folder: write_big_vision(folder / "m.npz", to_big_vision(params(config), config)),
        lambda folder: jax.tree.map(np.asarray, open_checkpoint(folder / "m.npz").params),
        {"m.npz": None},
    )


def _torchscript() -> Reader:
    def prepare(folder: pathlib.Path) -> None:
        import torch

        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = torch.nn.Linear(3, 2).half()
                self.register_buffer("steps", torch.tensor(3))

            def forward(self, x: Any) -> Any:
                return torch.sigmoid(self.linear.weight.float().sum() * x)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated
            torch.jit.trace(torch.nn.Sequential(Model()), torch.zeros(2), check_trace=False).save(str(folder / "m.pt"))
        (folder / "members").mkdir()
        with zipfile.ZipFile(folder / "m.pt") as archive:
            for info in archive.infolist():
                (folder / "members" / info.filename.replace("/", "|")).write_bytes(archive.read(info))

    def zip_again(folder: pathlib.Path, name: str) -> None:
        """A sound archive of the changed member."""
        if name == "m.pt":
            return
        with zipfile.ZipFile(folder / "m.pt", "w") as archive:
            for path in sorted((folder / "members").iterdir()):
                archive.writestr(path.name.replace("|", "/"), path.read_bytes())

    def read(folder: pathlib.Path) -> None:
        torchscript_activation(folder / "m.pt")
        for value in read_torchscript(folder / "m.pt").values():
            np.asarray(value)

    return Reader(prepare, read, {"m.pt": None, "members/m|data.pkl": None}, zip_again)


def _library(formats: list[str], files: dict[str, Any]) -> Reader:
    def prepare(folder: pathlib.Path) -> None:
        export_model(folder / "e", config=CONFIG, preprocess=Preprocess(16), params=params(CONFIG), formats=formats)
        if formats == ["hf"]:
            (folder / "e" / "open_clip_config.json").unlink()

    def read(folder: pathlib.Path) -> None:
        jax.tree.map(np.asarray, open_checkpoint(folder / "e").params)

    return Reader(prepare, read, files)


def _onnx() -> Reader:
    def prepare(folder: pathlib.Path) -> None:
        same: dict[str, Any] = {"config": SMALL, "params": params(SMALL, "mlp"), "form": Form()}
        write_onnx(folder, **same, preprocess=Preprocess(16))

    def read(folder: pathlib.Path) -> None:
        read_quantized(folder / "text_model_q2.onnx")
        read_metadata(folder / "text_model_q2.onnx")

    return Reader(prepare, read, {"text_model_q2.onnx": None})


def _litert() -> Reader:
    def prepare(folder: pathlib.Path) -> None:
        same: dict[str, Any] = {"config": WIDE, "params": params(WIDE, "mlp")}
        litert.write_litert(folder, **same, preprocess=Preprocess(16))

    def read(folder: pathlib.Path) -> None:
        litert.read_metadata(folder / "text.tflite")
        file = Flatbuffer(folder / "text.tflite")
        for matrix in map(file.matrix, file.integer_names()):
            if isinstance(matrix, Integers):
                decode_integers(matrix)
        file.with_outputs(file.names()[:3])

    return Reader(prepare, read, {"text.tflite": None})


def _golden() -> Reader:
    def prepare(folder: pathlib.Path) -> None:
        taps = {"image/patch": np.ones((1, 3), np.float32), "image/final": np.zeros((1, 2), np.float32)}
        pixels, tokens = np.zeros((1, 2, 2, 3), np.float32), np.zeros((1, 4), np.int32)
        write_golden(folder / "g.safetensors", Recording(pixels, tokens, taps, 100.0, {"library": "torch"}))

    def inner(data: bytes) -> Any:
        header = header_of(data)
        header["__metadata__"]["json"] = json.loads(header["__metadata__"]["json"])
        return header

    def outer(old: bytes, text: bytes) -> bytes:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            header = json.loads(text)
            header["__metadata__"]["json"] = json.dumps(header["__metadata__"]["json"])
            text = json.dumps(header).encode()
        return with_header(old, text)

    return Reader(prepare, lambda folder: read_golden(folder / "g.safetensors"), {"g.safetensors": (inner, outer)})


def _samples(spec: str, folder: pathlib.Path) -> None:
    """All samples; a bad one is counted by whoever reads."""
    source = open_source(f"{spec}:{folder / 'd'}.{spec if spec != 'wds' else 'tar'}", "train")
    for index in range(min(len(source), 50)):
        with contextlib.suppress(base.BadSample):
            source[index]


def png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, "PNG")
    return buffer.getvalue()


def _tar() -> Reader:
    def prepare(folder: pathlib.Path) -> None:
        with tarfile.open(folder / "d.tar", "w", format=tarfile.PAX_FORMAT) as archive:
            for name, data in (("0.png", png()), ("0.txt", b"a cat"), ("é" * 60 + "1.png", png()), ("1.txt", b"x\ny")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        _samples("wds", folder)
        (index,) = (folder / "cache" / "index").glob("*/")
        shutil.copytree(index, folder / "index")

    def read(folder: pathlib.Path) -> None:
        index = ShardIndex(folder / "index")
        for sample in range(min(len(index), 50)):
            with contextlib.suppress(base.BadSample):
                index.locate(sample)
                index.sample(sample)
        _samples("wds", folder)

    files = dict.fromkeys(("d.tar", "index/starts.npy", "index/sizes.npy", "index/faults.npy", "index/shards.txt"))
    return Reader(prepare, read, {"index/index.json": JSON_FILE, **files})


def _csv() -> Reader:
    def prepare(folder: pathlib.Path) -> None:
        (folder / "0.png").write_bytes(png())
        (folder / "d.csv").write_text(
            'filepath,title\n0.png,a cat\n"0.png","two\nlines, and a ""quote"""\nnone.png,x\n'
        )

    return Reader(prepare, lambda folder: _samples("csv", folder), {"d.csv": None})


def _parquet() -> Reader:
    def prepare(folder: pathlib.Path) -> None:
        (folder / "0.png").write_bytes(png())
        table = pyarrow.table({"filepath": ["0.png", "none.png", None], "captions": [["a", "b"], [], None]})
        pyarrow.parquet.write_table(table, folder / "d.parquet")

    return Reader(prepare, lambda folder: _samples("parquet", folder), {"d.parquet": None})


def _array_record() -> Reader:
    def prepare(folder: pathlib.Path) -> None:
        from array_record.python import array_record_module
        from tensorflow_datasets.proto import tf_example_pb2

        writer = array_record_module.ArrayRecordWriter(str(folder / "d.arrayrecord"), "group_size:1")
        for caption in (b"a cat", b"\xff", b""):
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(png())
            example.features.feature["caption"].bytes_list.value.append(caption)
            writer.write(example.SerializeToString())
        writer.close()

    return Reader(prepare, lambda folder: _samples("arrayrecord", folder), {"d.arrayrecord": None})


def _overrides() -> Reader:
    def prepare(folder: pathlib.Path) -> None:
        config = load_recipe("quickstart")
        lines = [f"{key}={value!r}" for key, value in _flat(config)]
        (folder / "overrides.json").write_text(json.dumps(lines))
        for i, line in enumerate(lines):
            (folder / f"{i}.txt").write_text(line)

    def read(folder: pathlib.Path) -> None:
        try:
            assignments = list(json.loads((folder / "overrides.json").read_bytes()))
        except (ValueError, TypeError, RecursionError):
            return  # the list is the test's own
        changed = (folder / "0.txt").read_bytes().decode("utf-8", "surrogateescape")
        run_config(override(load_recipe("quickstart"), [*map(str, assignments), changed]))

    return Reader(prepare, read, {"0.txt": None, "overrides.json": JSON_FILE})


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if hasattr(value, "items") and len(value):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


READERS: dict[str, Callable[[], Reader]] = {
    "safetensors": _safetensors,
    "manifest": _manifest,
    "gguf": _gguf,
    "big_vision": _big_vision,
    "torchscript": _torchscript,
    "transformers": lambda: _library(
        ["hf"],
        {"e/config.json": JSON_FILE, "e/preprocessor_config.json": JSON_FILE, "e/model.safetensors": SAFETENSORS},
    ),
    "open_clip": lambda: _library(["open_clip"], {"e/open_clip_config.json": JSON_FILE}),
    "onnx": _onnx,
    "litert": _litert,
    "tar": _tar,
    "csv": _csv,
    "parquet": _parquet,
    "arrayrecord": _array_record,
    "golden": _golden,
    "overrides": _overrides,
}
