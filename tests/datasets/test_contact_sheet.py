"""The page of a batch: unchanged pixels, and captions decoded from the tokens."""

from __future__ import annotations

import base64
import io
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from tclip_jax import cli
from tclip_jax.data.tokenizer import Tokenizer
from tclip_jax.datasets.contact_sheet import contact_sheet
from tclip_jax.inference.load import load_tokenizer
from tclip_jax.models.config import TextConfig
from tests.pages import Page
from tests.small_tokenizers import CONTEXT, write_gemma


def pictures(page: str) -> list[np.ndarray]:
    encoded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in encoded]


def test_the_page_shows_pixels_and_captions() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    tokens = Tokenizer(8)(["A <b>dog</b>", "a very long caption that is cut at some place", ""])
    batch = {"image": image, "tokens": tokens, "weight": np.array([1, 1, 0]), "fault": np.array([0, 0, 1])}
    names, reasons = ["/data/pets/a.png", "b.png", "/data/c<b>.png"], ["", "", "not a <usable> image"]
    page = contact_sheet("<title>", batch, names, reasons, [("seed", "3")])
    for shown, expected in zip(pictures(page), image[:2], strict=True):
        np.testing.assert_array_equal(shown, expected)
    assert "a &lt; b &gt; dog" in page and "<b>dog" not in page and "&lt;title&gt;" in page
    assert "8 tokens" in page and "bad: corrupt_image: not a &lt;usable&gt; image" in page
    text = Page(page).text
    assert 'title="/data/pets/a.png"' in page and "…/pets/a.png" in text and "…/data/c<b>.png" in text
    assert "seed3samples3bad1bad: corrupt_image1" in text and "captions that fill all 8 tokens100.0%" in text


def test_the_command_shows_the_first_samples_of_the_run(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheets = []
    for count in (4, 6):
        command = ["data", "show", "--config", "quickstart:student", "--count", str(count)]
        assert cli.main([*command, "--out", str(tmp_path / f"{count}.html")]) == 0
        sheets.append(pictures((tmp_path / f"{count}.html").read_text()))
    assert [len(sheet) for sheet in sheets] == [4, 6]
    for short, long in zip(*sheets, strict=False):
        np.testing.assert_array_equal(short, long)
    assert "6 samples of digits, 0 of them bad" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main(["data", "show", "--config", "quickstart:student", "--count", "0", "--out", "x"])


def test_a_bad_sample_is_shown_with_its_name_and_reason(
    tars: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.html"
    command = ["data", "show", "--config", "quickstart:student", f"--config.data.source=wds:{tars}/*.tar"]
    assert cli.main([*command, "--count", "11", "--out", str(sheet)]) == 0
    printed = capsys.readouterr()
    assert "11 samples of wds:" in printed.out and "4 of them bad" in printed.out
    page = Page(sheet.read_text())
    kinds = [word.split(": ")[1] for word in page.words if word.startswith("bad: ") and word.count(": ") > 1]
    assert {*kinds} == {"corrupt_image", "no_caption", "broken_shard", "empty_shard"} and len(page.pictures()) == 7
    names = {attributes["title"] for tag, attributes in page.tags if tag == "span" and "title" in attributes}
    assert len(names) == 11 and all(str(name).startswith(f"{tars}/") for name in names)


def test_captions_of_another_tokenizer_are_decoded_by_it(tmp_path: pathlib.Path) -> None:
    size = write_gemma(tmp_path)
    text = TextConfig(context_length=CONTEXT, vocab_size=size, hf_tokenizer_name="org/small")
    tokenizer = load_tokenizer(tmp_path, text)
    assert tokenizer is not None
    batch = {
        "image": np.zeros((1, 8, 8, 3), np.uint8),
        "tokens": tokenizer("two small dogs"),
        "weight": np.ones(1, np.float32),
        "fault": np.zeros(1, np.int32),
    }
    sheet = contact_sheet("title", batch, ["a"], [""], [], tokenizer)
    assert "two small dogs" in sheet and "tokens" not in sheet.split('<div class="cards">')[1]
