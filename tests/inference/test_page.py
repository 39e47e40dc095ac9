from __future__ import annotations

import base64
import html.parser
import io
import os
import pathlib

import numpy as np
import pytest
from etils import epath
from PIL import Image

from tclip_jax.inference.page import results_page

EVIL = '"><script>alert(1)</script><img src="http://example.com/x.png'


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def pictures(self) -> list[Image.Image]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(source.partition(";base64,")[2]))) for source in sources]


def picture(folder: pathlib.Path, name: str, mode: str = "RGB", size: tuple[int, int] = (640, 400)) -> epath.Path:
    Image.new(mode, size, 1 if mode in ("P", "I;16") else "red").save(folder / name)
    return epath.Path(folder / name)


def test_names_cannot_become_markup(tmp_path: pathlib.Path) -> None:
    path = picture(tmp_path, "a.png")
    page = Page(results_page(EVIL, EVIL, [(path, EVIL, 0.5)]))
    assert page.text.count(EVIL) == 4  # title, heading, facts, name
    known = ["html", "meta", "title", "style", "h1", "p", "div", "figure", "figcaption", "img", "b", "br"]
    assert {tag for tag, _ in page.tags} == set(known)


def test_the_page_loads_nothing(tmp_path: pathlib.Path) -> None:
    path = picture(tmp_path, "a.png")
    text = results_page("a cat", "", [(path, "a.png", 0.5)], picture=path)
    page = Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert name not in attributes or (tag == "img" and str(attributes[name]).startswith("data:image/"))
    assert "url(" not in text and "@import" not in text
    assert any(attributes.get("http-equiv") == "Content-Security-Policy" for _, attributes in page.tags)


@pytest.mark.parametrize(
    ("name", "mode", "kind", "size"),
    [
        ("a.png", "RGBA", "PNG", (272, 170)),
        ("a.png", "P", "PNG", (272, 170)),
        ("a.png", "I;16", "JPEG", (272, 170)),
        ("a.jpg", "CMYK", "JPEG", (272, 170)),
        ("a.jpg", "L", "JPEG", (272, 170)),
    ],
)
def test_thumbnails(tmp_path: pathlib.Path, name: str, mode: str, kind: str, size: tuple[int, int]) -> None:
    path = picture(tmp_path, name, mode)
    (found,) = Page(results_page("q", "", [(path, name, 1.0)])).pictures()
    assert (found.format, found.size) == (kind, size)


def test_small_pictures_are_shown_pixel_by_pixel(tmp_path: pathlib.Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    page = Page(results_page("q", "", [(epath.Path(tmp_path / "a.png"), "a.png", 1.0)]))
    (found,) = page.pictures()
    np.testing.assert_array_equal(np.asarray(found), image)
    assert [attributes["class"] for tag, attributes in page.tags if tag == "img"] == ["small"]


def test_photographs_stand_upright(tmp_path: pathlib.Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (640, 400)).save(tmp_path / "a.jpg", exif=exif)
    (found,) = Page(results_page("q", "", [(epath.Path(tmp_path / "a.jpg"), "a.jpg", 1.0)])).pictures()
    assert found.size == (170, 272)


def test_what_is_gone_or_unreadable_is_said(tmp_path: pathlib.Path) -> None:
    (tmp_path / "b.png").write_bytes(b"no picture")
    results = [(epath.Path(tmp_path / name), name, -0.5) for name in ("a.png", "b.png")]
    page = Page(results_page("q", "", results))
    assert page.text.count("no longer readable") == 2 and "1. -0.500" in page.text


def test_names_that_are_no_utf_8_can_be_written(tmp_path: pathlib.Path) -> None:
    name = os.fsdecode(b"\xff.png")
    page = results_page(name, name, [(epath.Path(tmp_path / "a.png"), name, 0.5)])
    assert "\\xff.png" in page.encode().decode()
