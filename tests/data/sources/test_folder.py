from __future__ import annotations

import os
import pathlib
import pickle

import pytest

from tclip_jax.data.sources import BadSample, Record, open_source


def write(root: pathlib.Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode())


def test_labelled_split_is_sorted(tmp_path: pathlib.Path) -> None:
    write(
        tmp_path,
        {
            "train/snow_leopard/b.PNG": "1",
            "train/snow_leopard/a.jpeg": "0",
            "train/cat/z.webp": "2",
            "train/cat/notes.md": "not an image",
            "train/cat/readme.txt": "no image of this name",
            "train/cat/.hidden.png": "",
            "train/.cache/x.png": "",
            "train/dog/.keep": "an empty class keeps its label",
            "test/cat/y.jpg": "3",
        },
    )
    source = open_source(f"folder:{tmp_path}", "train")

    assert source.classnames == ("cat", "dog", "snow leopard")
    assert [(source[i].image, source[i].label) for i in range(len(source))] == [(b"2", 0), (b"0", 2), (b"1", 2)]
    assert source[0].name == str(tmp_path / "train" / "cat" / "z.webp")
    assert all(source[i].captions == () for i in range(len(source)))


def test_folder_without_splits_serves_any_split(tmp_path: pathlib.Path) -> None:
    write(tmp_path, {"cat/1.png": "c", "dog/1.png": "d"})
    for split in ("train", "test"):
        assert [r.image for r in open_source(f"folder:{tmp_path}", split)] == [b"c", b"d"]


@pytest.mark.parametrize("nested", ["", "00000/"])
def test_captioned(tmp_path: pathlib.Path, nested: str) -> None:
    write(
        tmp_path,
        {
            f"train/{nested}a.jpg": "A",
            f"train/{nested}a.txt": "\ufeffA naïve café\n\n  second caption \r\n",
            f"train/{nested}b.png": "B",
        },
    )
    source = open_source(f"folder:{tmp_path}", "train")

    assert source.classnames == ()
    assert [source[0].captions, source[1].captions] == [("A naïve café", "second caption"), ()]
    assert [source[0].label, source[1].label] == [-1, -1]


def test_what_is_not_utf8(tmp_path: pathlib.Path) -> None:
    for name in (b"a\xe9", b"b"):
        (tmp_path / os.fsdecode(name + b".jpg")).write_bytes(b"image")
        (tmp_path / os.fsdecode(name + b".txt")).write_bytes(b"caf\xe9" if name == b"b" else b"a cat")
    source = open_source(f"folder:{tmp_path}", "train")
    assert source[0] == Record(b"image", ("a cat",), -1, f"{tmp_path}/a?.jpg")
    with pytest.raises(BadSample, match=r"b\.jpg: the caption is not UTF-8 at byte 3"):
        source[1]


def test_files_are_read_when_asked_for(tmp_path: pathlib.Path) -> None:
    write(tmp_path, {"cat/1.png": "before"})
    source = pickle.loads(pickle.dumps(open_source(f"folder:{tmp_path}", "train")))
    write(tmp_path, {"cat/1.png": "after"})
    assert source[0].image == b"after"


def test_missing_folder(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder \(looked for it and for .*nowhere/train\)"):
        open_source(f"folder:{tmp_path / 'nowhere'}", "train")


def test_missing_split_is_not_read_as_classes(tmp_path: pathlib.Path) -> None:
    write(tmp_path, {"train/cat/1.png": "", "val/cat/1.png": ""})
    with pytest.raises(ValueError, match=r"no split 'test'; it has train, val"):
        open_source(f"folder:{tmp_path}", "test")


@pytest.mark.parametrize("files", [{"train/notes.md": ""}, {"train/1.png": "neither class nor caption"}])
def test_nothing_to_read(tmp_path: pathlib.Path, files: dict[str, str]) -> None:
    write(tmp_path, files)
    with pytest.raises(ValueError, match=r"train: found neither <class>/<image> nor <image> with a \.txt beside it"):
        open_source(f"folder:{tmp_path}", "train")
