"""Embedding of images and texts: resumption, failures, the files, and the store."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from etils import epath
from PIL import Image

from tclip_jax.cli import main
from tclip_jax.inference.embed import Store, chunked, embed_images, embed_texts, embeddings_mark, write_embeddings
from tclip_jax.inference.inputs import Item, find_images, image_items, text_items
from tclip_jax.inference.model import Model


class Counting:
    """A model that counts its calls, and raises KeyboardInterrupt after `stop_after` of them."""

    def __init__(self, model: Model, stop_after: int = 10**9) -> None:
        self._model, self._left, self.calls = model, stop_after, 0
        self.preprocess, self.config = model.preprocess, model.config

    def encode_image(self, pixels: np.ndarray, **options: Any) -> np.ndarray:
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        self.calls += 1
        return self._model.encode_image(pixels, **options)


def embedded(model: Any, paths: Sequence[epath.Path], folder: pathlib.Path, batch_size: int = 2) -> np.ndarray:
    """Return all embeddings, via a store and a file."""
    items, _ = image_items("m", paths)
    store = Store(folder / "store", 12)
    embed_images(model, items, store, batch_size)
    write_embeddings(folder / "x.npy", items, store, 12)
    return np.load(folder / "x.npy")


def test_embeddings_equal_the_model(model: Model, readable: list[epath.Path], tmp_path: pathlib.Path) -> None:
    embeddings = embedded(model, readable, tmp_path)
    pictures = [Image.open(path) for path in readable]
    expected = model.encode_image([*pictures, pictures[-1]], batch_size=2)[:-1]
    assert embeddings.dtype == np.float32
    np.testing.assert_array_equal(embeddings, expected)
    assert json.loads((tmp_path / "x.names.json").read_text()) == list(map(str, readable))


@pytest.mark.parametrize("batch_size", [2, 3])
def test_an_interrupted_call_is_resumed(
    model: Model, readable: list[epath.Path], tmp_path: pathlib.Path, batch_size: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        embedded(Counting(model, stop_after=2), readable, tmp_path)
    assert not (tmp_path / "x.npy").exists()
    second = Counting(model)
    embeddings = embedded(second, readable, tmp_path, batch_size)
    assert second.calls == -(-(len(readable) - 4) // batch_size)
    np.testing.assert_allclose(embeddings, model.encode_image([Image.open(path) for path in readable]), atol=1e-6)


def test_a_bad_image_does_not_stop_the_others(
    model: Model, pictures: pathlib.Path, readable: list[epath.Path], tmp_path: pathlib.Path
) -> None:
    half = (pictures / "b" / "5.png").read_bytes()[:900]
    (pictures / "b" / "5.png").write_bytes(half)
    items, _ = image_items("m", find_images(pictures), epath.Path(pictures))
    store = Store(tmp_path / "store", 12)
    truncated, broken = embed_images(model, items, store, batch_size=3)
    assert truncated.name == "b/5.png" and truncated.reason == "not a usable image: image file is truncated"
    assert broken.name == "b/broken.png" and broken.reason == (
        "not a usable image (10 bytes): no supported format begins with b'no picture'"
    )
    assert write_embeddings(tmp_path / "x.npy", items, store, 12) == len(readable) - 1
    names = json.loads((tmp_path / "x.names.json").read_text())
    assert names == [item.name for item in items if item.name not in (truncated.name, broken.name)]


def test_files_that_are_too_large_are_not_read(model: Model, tmp_path: pathlib.Path) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**40)
    items, _ = image_items("m", [epath.Path(tmp_path / "huge.png")])
    (failure,) = embed_images(model, items, Store(tmp_path / "store", 12))
    assert failure.reason == "1,099,511,627,776 bytes, more than 268,435,456"


def test_texts_and_parquet(model: Model, tmp_path: pathlib.Path) -> None:
    texts = ["a cat", "ein Bär", "a cat"]
    items, store = text_items("m", texts), Store(tmp_path / "store", 12)
    assert embed_texts(model, items, store, batch_size=2) == []
    assert write_embeddings(tmp_path / "x.parquet", items, store, 12) == 3
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    assert table.column("name").to_pylist() == texts
    expected = model.encode_text(texts)
    np.testing.assert_allclose(np.array(table.column("embedding").to_pylist(), np.float32), expected, atol=1e-6)
    assert str(table.schema.field("embedding").type).startswith("fixed_size_list<") and len(expected[0]) == 12


def test_many_rows_are_streamed_in_order(tmp_path: pathlib.Path) -> None:
    items = text_items("m", list(map(str, range(5000))))
    rows = np.random.default_rng(0).random((5000, 3), np.float32)
    store = Store(tmp_path / "store", 3)
    for start in (2500, 0):  # not in the order of the items
        part = slice(start, start + 2500)
        store.add([item.key for item in items[part]], rows[part])
    for name in ("x.npy", "x.parquet"):
        write_embeddings(tmp_path / name, items, store, 3)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), rows)
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    np.testing.assert_array_equal(np.array(table.column("embedding").to_pylist(), np.float32), rows)
    assert table.column("name").to_pylist() == list(map(str, range(5000)))


def test_the_command(
    artifact: pathlib.Path,
    model: Model,
    pictures: pathlib.Path,
    readable: list[epath.Path],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "x.npy"
    arguments = ["embed", str(artifact), "--images", str(pictures), "--out", str(out)]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == f"{out}: 7 embeddings of 12 float32, 1 left out\n"
    skipped, failed = captured.err.splitlines()
    assert f"{pictures}: 2 files skipped: 1 .txt, 1 hidden folder; first {pictures}/.hidden" in skipped
    assert failed.startswith(f"{pictures}/b/broken.png: not a usable image")
    np.testing.assert_allclose(np.load(out), model.encode_image([Image.open(path) for path in readable]), atol=1e-6)
    assert not (tmp_path / "x.npy.partial").exists()
    assert main(arguments) == 2 and "exists: choose another file, or add --overwrite" in capsys.readouterr().err
    texts = tmp_path / "texts"
    texts.write_text("\ufeffa cat\n\n a dog \n", encoding="utf-8")
    assert main(["embed", str(artifact), "--texts", str(texts), "--out", str(out), "--overwrite"]) == 1
    assert capsys.readouterr().out == f"{out}: 2 embeddings of 12 float32, 1 left out\n"
    assert json.loads((tmp_path / "x.names.json").read_text()) == ["a cat", "a dog"]


@pytest.mark.parametrize("activations", ["A32", "A8"])
def test_the_command_packs_for_the_activations_that_are_asked_for(
    artifact: pathlib.Path, model: Model, readable: list[epath.Path], activations: Any, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "x.npy"
    files = list(map(str, readable))
    assert main(["embed", str(artifact), "--images", *files, "--out", str(out), "--activations", activations]) == 0
    expected = model.repacked(activations=activations).encode_image([Image.open(path) for path in readable])
    np.testing.assert_allclose(np.load(out), expected, atol=1e-6)


def test_the_command_resumes(
    artifact: pathlib.Path, model: Model, readable: list[epath.Path], tmp_path: pathlib.Path
) -> None:
    """Stored embeddings, which have a marked value here, are used without encoding the images again."""
    items, _ = image_items(embeddings_mark(model, artifact), readable[:3])
    Store(tmp_path / "x.npy.partial", 12).add([item.key for item in items], np.full((3, 12), 9, np.float32))
    files = [str(path) for path in readable]
    assert main(["embed", str(artifact), "--images", *files, "--out", str(tmp_path / "x.npy")]) == 0
    embeddings = np.load(tmp_path / "x.npy")
    assert (embeddings[:3] == 9).all() and (abs(embeddings[3:]) <= 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "absent.png", "--out", "x.npy"], "nothing to embed: none of 1 inputs can be used"),
        (["--images", "absent.png", "--out", "x.csv"], "x.csv: embeddings are written as .npy or .parquet"),
        (["--images", "broken.png", "--out", "x.npy"], "nothing to embed: none of 1 inputs can be used"),
        (["--texts", "absent", "--out", "x.npy"], "absent: no such file"),
        (["--texts", "empty", "--out", "x.npy"], "empty: it has no line of text"),
        (
            ["--texts", "latin", "--out", "x.npy"],
            "latin: line 2 is not UTF-8 (byte 0xe9): if it is Latin-1, convert it",
        ),
        (["--texts", "text.png", "--out", "x.npy"], "text.png: it has NUL bytes: not a text file"),
        (["--texts", ".", "--out", "x.npy"], ".: not a text file"),
        (
            ["--images", "folder", "--out", "x.npy"],
            "folder: no images in it or its subfolders (1 file skipped: 1 .xyz; first",
        ),
    ],
)
def test_unusable_inputs_leave_no_output(
    artifact: pathlib.Path,
    tmp_path: pathlib.Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes("a cat\nun café".encode("latin-1"))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "text.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / "text").write_text("a cat")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.xyz").touch()
    assert main(["embed", str(artifact), *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("x.*"))


def test_a_failed_write_leaves_the_old_embeddings_and_names(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of one call next to the rows of another would go unnoticed."""
    items = [Item(f"name {i}", str(i), "") for i in range(3)]
    store = Store(tmp_path / "store", 4)
    store.add(["0", "1", "2"], np.ones((3, 4), np.float32))
    write_embeddings(tmp_path / "x.npy", items[:2], store, 4)

    def fail(self: Store, key: str) -> None:
        raise OSError("the part is gone")

    monkeypatch.setattr(Store, "row", fail)
    with pytest.raises(OSError, match="the part is gone"):
        write_embeddings(tmp_path / "x.npy", items, store, 4)
    assert json.loads((tmp_path / "x.names.json").read_text()) == ["name 0", "name 1"]
    assert np.load(tmp_path / "x.npy").shape == (2, 4)


ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)


def test_another_store_reads_the_rows_by_key(tmp_path: pathlib.Path) -> None:
    store = Store(tmp_path / "s", 3)
    assert not (tmp_path / "s").exists()
    store.add(["a", "b"], ROWS[:2])
    again = Store(tmp_path / "s", 3)
    again.add(["c", "d"], ROWS[2:])
    for each in (again, Store(tmp_path / "s", 3)):
        np.testing.assert_array_equal(np.stack([each.row(key) for key in "dcba"]), ROWS[::-1])
        assert "a" in each and "e" not in each
    assert "c" not in store
    again.remove()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", None])
def test_unreadable_files_are_ignored(tmp_path: pathlib.Path, content: bytes | None) -> None:
    store = Store(tmp_path, 3)
    store.add(["a"], ROWS[:1])
    store.add(["b"], ROWS[1:2])
    part = tmp_path / "00000000.npz"
    part.write_bytes(part.read_bytes()[:-40] if content is None else content)
    again = Store(tmp_path, 3)
    assert "a" not in again and "b" in again
    again.add(["a"], ROWS[:1])
    np.testing.assert_array_equal(Store(tmp_path, 3).row("a"), ROWS[0])


def test_files_of_another_width_are_ignored(tmp_path: pathlib.Path) -> None:
    Store(tmp_path, 3).add(["a"], ROWS[:1])
    assert "a" not in Store(tmp_path, 4)


def test_pickles_are_not_loaded(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "00000000.npz", keys=np.array([{"a": 1}], object), embeddings=ROWS[:1])
    assert "a" not in Store(tmp_path, 3)


@pytest.mark.parametrize("count", [0, 1, 4096, 4097])
def test_chunks_have_every_row(count: int) -> None:
    rows = np.arange(2 * count, dtype=np.float32).reshape(count, 2)
    chunks = list(chunked(iter(rows), 2))
    assert all(0 < len(chunk) <= 4096 for chunk in chunks)
    np.testing.assert_array_equal(np.concatenate([np.empty((0, 2), np.float32), *chunks]), rows)
