"""The index of a folder of pictures, queries, and the results page."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tclip_jax.cli import main
from tclip_jax.inference import search
from tclip_jax.inference.embed import embeddings_mark
from tclip_jax.inference.model import Model
from tclip_jax.inference.search import build_index, nearest, query_index, read_index, results_page
from tclip_jax.ternary import Quantizer, repack, ternarize
from tests.object_store import Bucket, Failure
from tests.pages import Page


@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_nearest_equals_a_full_sort(count: int, top: int, chunk: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, query = rng.integers(-2, 3, (count, 3)).astype(np.float32), rng.integers(-2, 3, 3).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_CHUNK", chunk)
        indices, scores = nearest(rows, query, top)
    expected = np.argsort(-(rows @ query), kind="stable")[:top]  # ties in the order of the rows
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(scores, (rows @ query)[expected])


@pytest.fixture
def index(model: Model, artifact: pathlib.Path, pictures: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The index of the folder of pictures."""
    outcome = build_index(model, pictures, tmp_path / "index", model_path=str(artifact))
    assert (outcome.count, outcome.reused, [failure.name for failure in outcome.failures]) == (7, 0, ["b/broken.png"])
    return tmp_path / "index"


def test_a_picture_finds_itself(model: Model, index: pathlib.Path, readable: list[epath.Path]) -> None:
    loaded = read_index(index)
    for path in readable:
        first, second, *_ = query_index(model, loaded, path, top=3, model_path=loaded.model)
        assert loaded.root / first.name == path
        assert first.score == pytest.approx(1, abs=1e-6) and second.score < first.score


def test_a_text_is_compared_with_every_picture(
    model: Model, artifact: pathlib.Path, index: pathlib.Path, readable: list[epath.Path]
) -> None:
    results = query_index(model, read_index(index), "a cat", top=100, model_path=str(artifact))
    scores = model.encode_image([Image.open(path) for path in readable]) @ model.encode_text("a cat")[0]
    order = np.argsort(-scores)
    names = [os.path.relpath(path, index.parent / "pictures") for path in readable]
    assert [result.name for result in results] == [names[i] for i in order]
    np.testing.assert_allclose([result.score for result in results], scores[order], atol=1e-6)


def test_only_changed_files_are_embedded_again(
    model: Model, artifact: pathlib.Path, index: pathlib.Path, pictures: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_index(index)
    rows = dict(zip(before.names, np.array(before.embeddings), strict=True))
    (pictures / "0.png").unlink()
    shutil.copy(pictures / "b" / "5.png", pictures / "1.jpg")
    Image.new("RGB", (16, 16), "red").save(pictures / "new.png")
    read: list[str] = []
    original = search.embed_images

    def spy(model: Model, items: list[search.Item], *rest: object) -> list[search.Failure]:
        read.extend(item.name for item in items)
        return original(model, items, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(search, "embed_images", spy)
    outcome = build_index(model, pictures, index, model_path=str(artifact))
    assert read == ["1.jpg", "b/broken.png", "new.png"]
    assert (outcome.count, outcome.reused) == (7, 5)
    after = read_index(index)
    assert after.names == ["1.jpg", "2.PNG", "b/3.webp", "b/4.png", "b/5.png", "b/6.png", "new.png"]
    for name, row in zip(after.names, after.embeddings, strict=True):
        if name not in ("1.jpg", "new.png"):
            np.testing.assert_array_equal(row, rows[name])
    np.testing.assert_allclose(after.embeddings[0], rows["b/5.png"], atol=1e-6)
    assert sorted(path.name for path in index.parent.iterdir()) == ["index", "pictures"]


def test_replaced_files_of_equal_size_and_time_are_embedded_again(
    model: Model, artifact: pathlib.Path, pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (16, 16), colour).save(pictures / f"s{number}.bmp")
    build_index(model, pictures, tmp_path / "index", model_path=str(artifact))
    first, second = pictures / "s0.bmp", pictures / "s1.bmp"
    stamps = [path.stat() for path in (first, second)]
    first.rename(pictures / "other"), second.rename(first), (pictures / "other").rename(second)
    third = pictures / "0.png"
    before = third.stat()
    data = third.read_bytes()
    third.write_bytes(data[:-20] + bytes(20))
    for path, stamp in ((first, stamps[0]), (second, stamps[1]), (third, before)):
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (stamp.st_size, stamp.st_mtime_ns)
    old = read_index(tmp_path / "index")
    rows = dict(zip(old.names, np.array(old.embeddings), strict=True))
    again = build_index(model, pictures, tmp_path / "index", model_path=str(artifact))
    assert again.reused == 6, "of nine files, two were swapped and one rewritten"
    new = read_index(tmp_path / "index")
    new_rows = dict(zip(new.names, new.embeddings, strict=True))
    np.testing.assert_allclose([new_rows["s0.bmp"], new_rows["s1.bmp"]], [rows["s1.bmp"], rows["s0.bmp"]], atol=1e-6)


def test_activations_change_the_mark(model: Model, artifact: pathlib.Path) -> None:
    trits = ternarize(np.ones((32, 8), np.float32), Quantizer())  # type: ignore[arg-type]
    models = [
        dataclasses.replace(model, params={**model.params, "packed": repack(trits, activations=each)})
        for each in ("A32", "A16", "A8")
    ]
    assert [each.activations for each in (model, *models)] == ["A32", "A32", "A16", "A8"]
    marks = [embeddings_mark(each, artifact) for each in (model, *models)]
    assert marks[0] == marks[1] and len(set(marks)) == 3


def test_an_interruption_leaves_the_old_index_and_the_partial_work(
    model: Model, artifact: pathlib.Path, index: pathlib.Path, pictures: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = (index / "index.json").read_bytes()
    for path in pictures.rglob("*.png"):
        os.utime(path, (1, 1))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(search, "write_npy_header", stop)
        with pytest.raises(KeyboardInterrupt):
            build_index(model, pictures, index, model_path=str(artifact))
    assert (index / "index.json").read_bytes() == old
    monkeypatch.setattr(Model, "encode_image", stop)
    assert build_index(model, pictures, index, model_path=str(artifact)).count == 7
    assert not (index.parent / "index.partial").exists()


def test_a_failed_upload_leaves_the_old_index(
    model: Model, artifact: pathlib.Path, pictures: pathlib.Path, readable: list[epath.Path], bucket: type[Bucket]
) -> None:
    out = epath.Path("gs://bucket/index")
    build_index(model, pictures, out, model_path=str(artifact))
    (pictures / "b" / "more.png").write_bytes(readable[0].read_bytes())
    for operation in ("open", "write", "close", "copy"):
        bucket.failing = Failure(operation)
        with pytest.raises(OSError, match="the network is gone"):
            build_index(model, pictures, out, model_path=str(artifact))
        bucket.failing = lambda operation, path: None
        assert len(read_index(out).names) == 7
    assert build_index(model, pictures, out, model_path=str(artifact)).count == 8 == len(read_index(out).names)


def test_another_model_embeds_everything_again_and_cannot_query(
    model: Model, index: pathlib.Path, pictures: pathlib.Path
) -> None:
    params = {**model.params, "logit_scale": model.params["logit_scale"] + 1}
    other = Model(model.config, model.preprocess, params)
    with pytest.raises(ValueError, match="another model made the index"):
        query_index(other, read_index(index), "a cat", model_path="other")
    assert build_index(other, pictures, index, model_path="other").reused == 0
    assert query_index(other, read_index(index), "a cat", top=1, model_path="other")
    with pytest.raises(ValueError, match="top is 0"):
        query_index(other, read_index(index), "a cat", top=0, model_path="other")
    with pytest.raises(ValueError, match=r"broken\.png: not a usable image"):
        query_index(other, read_index(index), epath.Path(pictures / "b" / "broken.png"), model_path="other")


def test_other_folders_are_not_overwritten(model: Model, pictures: pathlib.Path) -> None:
    with pytest.raises(FileExistsError, match=r"exists and is not an index: it has no index\.json"):
        build_index(model, pictures, pictures, model_path="")
    (pictures / "bad").mkdir()
    (pictures / "bad" / "x.png").touch()
    with pytest.raises(ValueError, match=r"all 1 images are unusable; x\.png: not a usable image \(0 bytes\)"):
        build_index(model, pictures / "bad", pictures / "out", model_path="")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activations": "A4"}, "activations are 'A4': they must be A32, A16, A8"),
        ({"format_version": 2}, "format 'tclip-index' version 2, expected 'tclip-index' version 1"),
        ({"format": "zip"}, "format 'zip'"),
        ({"names": ["../secret.png"] * 7}, "names must be paths inside its root"),
        ({"names": ["/etc/secret.png"] * 7}, "names must be paths inside its root"),
        ({"names": ["a.png"]}, r"embeddings.npy is float32 \(7, 12\), expected 1 rows of float32"),
        ({"keys": 3}, "TypeError"),
        ({"root": None}, "TypeError"),
    ],
)
def test_a_broken_index_is_refused(index: pathlib.Path, fields: dict[str, object], message: str) -> None:
    good = json.loads((index / "index.json").read_text())
    (index / "index.json").write_text(json.dumps(good | fields))
    with pytest.raises(ValueError, match=f"^{index} is not a valid index: .*{message}"):
        read_index(index)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x80\x04N."])
def test_broken_embeddings_are_refused(index: pathlib.Path, content: bytes) -> None:
    (index / "embeddings.npy").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{index} is not a valid index: "):
        read_index(index)


def test_the_commands(
    artifact: pathlib.Path,
    pictures: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index, page = str(tmp_path / "index"), tmp_path / "page.html"
    monkeypatch.chdir(artifact.parent)
    assert main(["search", "index", artifact.name, str(pictures), "--out", index]) == 1
    captured = capsys.readouterr()
    assert captured.out == f"{index}: 7 images, 0 of them unchanged, 1 left out\n"
    assert captured.err.splitlines()[-1].startswith("b/broken.png: not a usable image")
    monkeypatch.chdir(tmp_path)  # the index records the path of its model
    assert main(["search", "query", index, str(pictures / "b" / "4.png"), "--top", "2", "--html", str(page)]) == 0
    first, _ = capsys.readouterr().out.splitlines()
    assert first.split() == ["1", "1.000", "b/4.png"]
    assert page.read_text().count("data:image/png;base64,") + page.read_text().count("data:image/jpeg;base64,") == 3
    assert main(["search", "query", index, "a cat", "--json", "--model", str(artifact)]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 7
    assert main(["search", "query", str(tmp_path / "none"), "a cat"]) == 2
    assert "index.json: no such file; expected an index made by `tclip search index`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        ("nothere.jpg", [], "nothere.jpg: no such image file; add --text to search for it as a text"),
        ("NOTHERE.JPG", [], "NOTHERE.JPG: no such image file"),
        ("pictures/7.png", [], "pictures/7.png: no such image file"),
        ("pictures/b", [], "pictures/b: a folder, not an image file; add --text to search for it as a text"),
        ("black/white", [], "black/white: no such image file"),
        ("a cat", ["--image"], "a cat"),
        ("nothere.jpg", ["--image"], "nothere.jpg"),
        (" ", [], "the query is empty"),
        ("", ["--text"], "the query is empty"),
    ],
)
def test_a_missing_file_is_not_searched_as_a_text(
    query: str,
    options: list[str],
    message: str,
    index: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["search", "query", str(index), query, *options]) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if " INFO " not in line]
    assert captured.out == "" and message in line and line.startswith("tclip search: error: ")


def test_text_and_image_options_override_the_guess(
    index: pathlib.Path, pictures: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures)
    shutil.copy(pictures / "0.png", pictures / "a cat")
    shown = {}
    for query, option in (("a cat", ""), ("a cat", "--image"), ("0.png", ""), ("a cat", "--text"), ("b/w", "--text")):
        assert main(["search", "query", str(index), query, *([option] if option else []), "--top", "1", "--json"]) == 0
        shown[query, option] = json.loads(capsys.readouterr().out)[0]
    assert shown["a cat", ""] == shown["a cat", "--image"] == shown["0.png", ""]
    assert shown["0.png", ""]["image"] == "0.png" and shown["a cat", "--text"]["similarity"] < 0.999


EVIL = '"><script>alert(1)</script><img src="http://example.com/x.png'


def parse(page: str) -> Page:
    return Page(page, forbidden=("link", "script", "iframe"))


def picture(folder: pathlib.Path, name: str, mode: str = "RGB", size: tuple[int, int] = (640, 400)) -> epath.Path:
    Image.new(mode, size, 1 if mode in ("P", "I;16") else "red").save(folder / name)
    return epath.Path(folder / name)


def test_the_page_escapes_names(tmp_path: pathlib.Path) -> None:
    path = picture(tmp_path, "a.png")
    page = parse(results_page(EVIL, EVIL, [(path, EVIL, 0.5)]))
    assert page.text.count(EVIL) == 4  # title, heading, facts, name
    known = ["html", "meta", "title", "style", "h1", "p", "div", "figure", "figcaption", "img", "b", "br"]
    assert {tag for tag, _ in page.tags} == set(known)


def test_the_page_loads_nothing(tmp_path: pathlib.Path) -> None:
    path = picture(tmp_path, "a.png")
    text = results_page("a cat", "", [(path, "a.png", 0.5)], picture=path)
    page = parse(text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert name not in attributes or (tag == "img" and str(attributes[name]).startswith("data:image/"))
    assert "url(" not in text and "@import" not in text
    assert any(attributes.get("http-equiv") == "Content-Security-Policy" for _, attributes in page.tags)


@pytest.mark.parametrize(
    ("name", "mode", "kind"),
    [
        ("a.png", "RGBA", "PNG"),
        ("a.png", "P", "PNG"),
        ("a.png", "I;16", "JPEG"),
        ("a.jpg", "CMYK", "JPEG"),
        ("a.jpg", "L", "JPEG"),
    ],
)
def test_thumbnails(tmp_path: pathlib.Path, name: str, mode: str, kind: str) -> None:
    path = picture(tmp_path, name, mode)
    (shown,) = parse(results_page("q", "", [(path, name, 1.0)])).pictures()
    assert shown.format == kind and shown.width < 640 and shown.width > shown.height


def test_small_pictures_are_shown_with_visible_pixels(tmp_path: pathlib.Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    page = parse(results_page("q", "", [(epath.Path(tmp_path / "a.png"), "a.png", 1.0)]))
    (shown,) = page.pictures()
    np.testing.assert_array_equal(np.asarray(shown), image)
    assert [attributes["class"] for tag, attributes in page.tags if tag == "img"] == ["small"]


def test_thumbnails_are_rotated_by_exif(tmp_path: pathlib.Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", (640, 400)).save(tmp_path / "a.jpg", exif=exif)
    (shown,) = parse(results_page("q", "", [(epath.Path(tmp_path / "a.jpg"), "a.jpg", 1.0)])).pictures()
    assert shown.width < shown.height


def test_missing_and_unreadable_pictures_are_noted(tmp_path: pathlib.Path) -> None:
    (tmp_path / "b.png").write_bytes(b"no picture")
    results = [(epath.Path(tmp_path / name), name, -0.5) for name in ("a.png", "b.png")]
    page = parse(results_page("q", "", results))
    assert page.text.count("no longer readable") == 2 and "1. -0.500" in page.text


def test_names_that_are_not_utf_8_are_escaped(tmp_path: pathlib.Path) -> None:
    name = os.fsdecode(b"\xff.png")
    page = results_page(name, name, [(epath.Path(tmp_path / "a.png"), name, 0.5)])
    assert "\\xff.png" in page.encode().decode()
