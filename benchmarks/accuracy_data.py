"""The images of the accuracy benchmark, from archives to `folder:` sources."""

from __future__ import annotations

import hashlib
import io
import json
import pathlib
import tarfile
from collections.abc import Iterator

import tokenizers
from etils import epath
from PIL import Image
from tokenizers import models, normalizers, pre_tokenizers, processors

from configs.accuracy import END, PAD, UNKNOWN, vocabulary
from tclip_jax import keys
from tclip_jax.data.file_tokenizer import TOKENIZER_JSON
from tclip_jax.data.sources.content import contents
from tclip_jax.storage import atomic_folder, write_atomic

HELD_OUT = 1000  # of the 5,000 training images of each class of CIFAR-10, the last ones


def lay_out(folder: pathlib.Path, shared: pathlib.Path, data: str, per_class: int, *, choose: bool = False) -> None:
    """Extract the images of one data set to `folder` as a `folder:` source, atomically, unless the folder exists.

    Args:
      folder: where the images go.
      shared: the folder of the archives.
      data: a data set of configs/accuracy.py; cifar10_words has the images of cifar10.
      per_class: the most images of a class.
      choose: of CIFAR-10, make `test` of training images that are held out from `train`, to choose methods and rates
        without the test images.

    Raises:
      ValueError: the existing folder was made from other archives or with other settings.
    """
    data = data.removesuffix("_words")
    archives = sorted((shared / data).glob("*.tar*"))
    made_by = keys.recipe(
        archives={path.name: content for path, content in zip(archives, contents(map(str, archives)), strict=True)},
        per_class=per_class,
        **({"held_out": HELD_OUT} if choose else {}),
    )
    note = folder.with_name(f"{folder.name}.json")
    if folder.exists():
        if differs := keys.difference(json.loads(note.read_text()) if note.exists() else {}, made_by):
            raise ValueError(f"{folder}: it was made from other inputs ({differs}); choose another --out")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(epath.Path(note), json.dumps(made_by, indent=2) + "\n")
    with atomic_folder(folder) as building:
        files = _cifar10(shared / data, per_class, choose) if data == "cifar10" else _emoji(shared / data, per_class)
        for name, content in files:
            path = building / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def write_tokenizer(folder: pathlib.Path) -> None:
    """Write the tokenizer of cifar10_words, as transformers reads it, unless the folder has it.

    Raises:
      ValueError: the folder has another one.
    """
    words = vocabulary()
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, words.index(END))]
    )
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "unk_token": UNKNOWN, "eos_token": END}
    files = {TOKENIZER_JSON: tokenizer.to_str(), "tokenizer_config.json": json.dumps(stated)}
    if not folder.exists():
        with atomic_folder(folder) as building:
            for name, text in files.items():
                (building / name).write_text(text)
    elif any((folder / name).read_text() != text for name, text in files.items()):
        raise ValueError(f"{folder}: it has the tokenizer of other captions; choose another --out")


def _cifar10(shared: pathlib.Path, per_class: int, choose: bool) -> Iterator[tuple[str, bytes]]:
    """Yield (path, bytes) of the first images of each class: `train/<class>/<nnnn>.jpg` and `test/…`."""
    for name, content in _members(shared / "cifar10_jpg.tar.xz"):
        split, classname, file = ("", "", *pathlib.PurePosixPath(name).parts)[-3:]
        if split not in (("train",) if choose else ("train", "test")):
            continue
        number = int(pathlib.PurePosixPath(file).stem)
        if choose and number >= 5000 - HELD_OUT:
            split, number = "test", number - (5000 - HELD_OUT)
        if number < per_class:
            yield f"{split}/{classname}/{file}", content


def _emoji(shared: pathlib.Path, per_class: int) -> Iterator[tuple[str, bytes]]:
    """Yield (path, bytes): `train` in one drawing style; in the other, `test` with the same names and `unseen`."""
    for shard in ("noto", "blob"):
        files: dict[str, dict[str, bytes]] = {}
        for name, content in _members(shared / f"{shard}.tar"):
            stem, _, kind = pathlib.PurePosixPath(name).name.partition(".")
            files.setdefault(stem, {})[kind] = content
        for stem, each in sorted(files.items()):
            trained = hashlib.sha256(each["txt"].strip()).digest()[0] % 2 == 0
            split = {("noto", True): "train", ("blob", True): "test", ("blob", False): "unseen"}.get((shard, trained))
            if split and (per_class > 100 or hashlib.sha256(stem.encode()).digest()[1] < 64):
                yield f"{split}/{stem}.png", _on_white(each["png"])
                yield f"{split}/{stem}.txt", each["txt"]


def _members(archive: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            if file:
                yield member.name, file.read()


def _on_white(png: bytes) -> bytes:
    with Image.open(io.BytesIO(png)) as picture:
        rgba = picture.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    buffer = io.BytesIO()
    flat.save(buffer, format="png")
    return buffer.getvalue()
