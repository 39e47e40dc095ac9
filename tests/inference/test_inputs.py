"""Finding image files and texts, and their keys."""

from __future__ import annotations

import os
import pathlib

import pytest
from etils import epath

from tclip_jax.inference.inputs import Failure, find_images, find_texts, image_items, log_failures, text_items


def test_images_are_found_in_subfolders_in_order(pictures: pathlib.Path) -> None:
    names = [os.path.relpath(path, pictures) for path in find_images(pictures)]
    assert names == [
        "0.png",
        "1.jpg",
        "2.PNG",
        *(f"b/{name}" for name in ["3.webp", "4.png", "5.png", "6.png", "broken.png"]),
    ]


def test_a_folder_without_images_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{tmp_path}: no images in it or its subfolders"):
        find_images(tmp_path)


def test_a_key_changes_with_the_file_and_the_model(pictures: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = epath.Path(pictures / "0.png")

    def key(mark: str = "m") -> str:
        ((item,), failures) = image_items(mark, [path], epath.Path(pictures))
        assert item.name == "0.png" and item.content == path and not failures
        return item.key

    first = key()
    assert key() == first != key("other")
    monkeypatch.chdir(pictures)
    ((relative,), _) = image_items("m", [epath.Path("0.png")])
    assert relative.key == first
    os.utime(path, ns=(0, 1))
    assert key() != first


def test_missing_files_are_failures(pictures: pathlib.Path) -> None:
    items, failures = image_items("m", [epath.Path(pictures / "absent.png"), epath.Path(pictures / "0.png")])
    assert len(items) == 1
    assert failures == [Failure(f"{pictures}/absent.png", "No such file or directory")]


def test_the_name_of_a_text_is_the_text() -> None:
    one, other = text_items("m", ["ä cat", "a dog"])
    assert (one.name, one.content) == ("ä cat", "ä cat") and one.key != other.key


def test_every_image_format_is_found_and_other_files_are_counted(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.BMP", "b.tif", "c.ppm", "d.avif", "e/f.jp2", "g.xyz", "h", ".i.png", "my.png/j.gif", "._k.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [os.path.relpath(path, tmp_path) for path in find_images(tmp_path)]
    assert names == ["a.BMP", "b.tif", "c.ppm", "d.avif", "e/f.jp2", "my.png/j.gif"]
    assert caplog.messages == [
        f"{tmp_path}: 4 files skipped: 2 hidden, 1 .xyz, 1 without a suffix; first {tmp_path}/._k.jpg"
    ]


def test_every_line_is_a_text(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = tmp_path / "texts"
    texts.write_bytes("one\u2028a\x0bb\x0cc\x85d\r\n\n \ntwo\rthree\n\n".encode())
    assert find_texts(texts) == (["one\u2028a\x0bb\x0cc\x85d", "two", "three"], 2)
    assert caplog.messages == [f"{texts}: 2 blank lines left out; first line 2"]


def test_failures_beyond_ten_are_a_count(caplog: pytest.LogCaptureFixture) -> None:
    failures = [Failure(f"{i}.png", "no image") for i in range(1012)]
    log_failures(failures[:10])
    assert caplog.messages == [f"{i}.png: no image" for i in range(10)]
    caplog.clear()
    log_failures(failures)
    assert len(caplog.messages) == 11 and caplog.messages[-1] == "1,002 more inputs cannot be used"
