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


def test_labelled_images_are_sorted_by_class(tmp_path: pathlib.Path) -> None:
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


def test_a_folder_without_splits_serves_any_split(tmp_path: pathlib.Path) -> None:
    write(tmp_path, {"cat/1.png": "c", "dog/1.png": "d"})
    for split in ("train", "test"):
        assert [r.image for r in open_source(f"folder:{tmp_path}", split)] == [b"c", b"d"]


@pytest.mark.parametrize("nested", ["", "00000/"])
def test_captions_are_the_lines_of_the_text_file(tmp_path: pathlib.Path, nested: str) -> None:
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


def test_names_and_captions_that_are_not_utf8(tmp_path: pathlib.Path) -> None:
    for name in (b"a\xe9", b"b"):
        (tmp_path / os.fsdecode(name + b".jpg")).write_bytes(b"image")
        (tmp_path / os.fsdecode(name + b".txt")).write_bytes(b"caf\xe9" if name == b"b" else b"a cat")
    source = open_source(f"folder:{tmp_path}", "train")
    assert source[0] == Record(b"image", ("a cat",), -1, f"{tmp_path}/a\\xe9.jpg")
    with pytest.raises(BadSample, match=r"b\.jpg: the caption is not UTF-8 at byte 3"):
        source[1]


def test_images_are_read_with_their_record(tmp_path: pathlib.Path) -> None:
    write(tmp_path, {"cat/1.png": "before"})
    source = pickle.loads(pickle.dumps(open_source(f"folder:{tmp_path}", "train")))
    write(tmp_path, {"cat/1.png": "after"})
    assert source[0].image == b"after"


def test_a_missing_folder_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder \(tried .*nowhere and .*nowhere/train\)"):
        open_source(f"folder:{tmp_path / 'nowhere'}", "train")


def test_split_folders_are_not_read_as_classes(tmp_path: pathlib.Path) -> None:
    write(tmp_path, {"train/cat/1.png": "", "val/cat/1.png": ""})
    with pytest.raises(ValueError, match=r"no split 'test'; it has train, val"):
        open_source(f"folder:{tmp_path}", "test")


@pytest.mark.parametrize("files", [{"train/notes.md": ""}, {"train/1.png": "neither class nor caption"}])
def test_a_folder_without_samples_is_refused(tmp_path: pathlib.Path, files: dict[str, str]) -> None:
    write(tmp_path, files)
    with pytest.raises(ValueError, match=r"train: found neither <class>/<image> nor <image> with a \.txt beside it"):
        open_source(f"folder:{tmp_path}", "train")


def image_folder(root: pathlib.Path) -> list[tuple[str, int]]:
    """Reimplements torchvision 0.28 (`make_dataset` in datasets/folder.py), except for hidden files."""
    suffixes = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
    images = []
    for label, name in enumerate(sorted(entry.name for entry in os.scandir(root) if entry.is_dir())):
        for folder, _, files in sorted(os.walk(root / name, followlinks=True)):
            for file in sorted(files):
                if file.lower().endswith(suffixes) and not file.startswith("."):
                    images.append((os.path.join(folder, file), label))
    return images


def test_class_folders_equal_torchvision(tmp_path: pathlib.Path) -> None:
    names = ["a.BMP", "b.tif", "c.ppm", "d.pgm", "e.JPG", "f/g.png", "f/h/i.webp", "f-1/j.tiff", "é \n.jpeg", "k.l.png"]
    root = tmp_path / "set"
    write(root, {f"{name}/{file}": file for name in ("cat", "my.png", "train_a") for file in names})
    write(tmp_path, {"elsewhere/z.png": "z"})
    (root / "cat" / "link").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "o.png").symlink_to(root / "cat" / "k.l.png")
    write(root, {"cat/._a.BMP": "", "cat/x.xyz": "", "cat/README": "", "top.png": "", "dog/.keep": "", "cat/y.txt": ""})
    source = open_source(f"folder:{root}", "train")
    expected = image_folder(root)
    assert len(expected) == 32 and source.classnames == ("cat", "dog", "my.png", "train a")
    labels = [source[i].label for i in range(len(source))]
    assert [(source[i].name.replace("\\n", "\n"), label) for i, label in enumerate(labels)] == expected
    assert source.notes == [  # type: ignore[attr-defined]
        f"{root}: 6 files skipped: 2 hidden, 1 .txt without an image, 1 .xyz, "
        f"1 image outside the class folders, 1 without a suffix; first {root}/cat/._a.BMP",
        f"{root}: 1 of 4 class folders without an image: dog",
    ]


def test_a_link_to_a_parent_folder_is_not_followed(tmp_path: pathlib.Path) -> None:
    write(tmp_path, {"cat/1.png": "c"})
    (tmp_path / "cat" / "again").symlink_to(tmp_path)
    source = open_source(f"folder:{tmp_path}", "train")
    assert len(source) == 1
    assert "1 file skipped: 1 link to a parent folder; first" in source.notes[0]  # type: ignore[attr-defined]


def test_upper_case_suffixes_and_nested_folders(tmp_path: pathlib.Path) -> None:
    write(tmp_path, {"a.JPG": "A", "a.TXT": "one\x0b\u2028\x85two\rthree", "x/y/b.gif": "B", "x/y/b.txt": "four"})
    source = open_source(f"folder:{tmp_path}", "train")
    assert [source[i].captions for i in range(2)] == [("one\x0b\u2028\x85two", "three"), ("four",)]
    assert source.notes == []  # type: ignore[attr-defined]


def test_a_pipe_is_a_bad_sample(tmp_path: pathlib.Path) -> None:
    (tmp_path / "cat").mkdir()
    os.mkfifo(tmp_path / "cat" / "1.png")
    with pytest.raises(BadSample, match=r"1\.png: not a regular file"):
        open_source(f"folder:{tmp_path}", "train")[0]
