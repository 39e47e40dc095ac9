from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest

from tclip_jax.data.images import Preprocess
from tclip_jax.inference.model import Model
from tclip_jax.numerics.inputs import (
    compare_pixels,
    compare_tokens,
    inputs_report,
    same_in_transformers,
    sample_images,
    square_rgb,
)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_both_libraries_read_samples_as_we_do(model: Model, exported: pathlib.Path) -> None:
    report = inputs_report(model, exported)
    rows = {row.name: row.compared for row in report.tables["inputs"]}
    assert report.passed and list(rows) == [
        f"{library} {kind}" for library in ("open_clip", "transformers") for kind in ("tokens", "pixels")
    ]
    assert rows["open_clip tokens"] == rows["open_clip pixels"] == rows["transformers pixels"] == 50
    assert rows["transformers tokens"] >= 20


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_without_its_files_transformers_is_left_out(model: Model, tmp_path: pathlib.Path) -> None:
    assert len(inputs_report(model, tmp_path, count=3).tables["inputs"]) == 2


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_images_that_nobody_can_resize_are_left_out(model: Model, tmp_path: pathlib.Path) -> None:
    longest = dataclasses.replace(model, preprocess=Preprocess(16, resize_mode="longest"))
    report = inputs_report(longest, tmp_path, count=12)
    rows = {row.name: row.compared for row in report.tables["inputs"]}
    assert report.passed and 6 < rows["open_clip pixels"] < rows["open_clip tokens"] == 12


def test_the_first_text_that_differs_is_named() -> None:
    ours = np.array([[1, 2, 3], [1, 2, 3], [4, 5, 6]], np.int32)
    row = compare_tokens("t", ours, ours + np.int32([[0], [1], [2]]), ["a", "b", "c"])
    assert (row.compared, row.differ, row.max_abs, row.first) == (3, 2, 2, "'b'") and row.over(0)
    same = compare_tokens("t", ours, ours, ["a", "b", "c"])
    assert (same.differ, same.first) == (0, "") and not same.over(0)


def test_the_first_image_that_differs_is_named() -> None:
    pixels = [np.zeros((2, 2, 3), np.float32)] * 3
    images = sample_images(3)
    theirs = [pixels[0], pixels[0] + np.float32(5e-7), np.zeros((2, 1, 3), np.float32)]
    row = compare_pixels("p", pixels, theirs, images)
    assert (row.differ, row.max_abs) == (1, np.inf) and row.first == f"image 2: {images[2].mode} {images[2].size}"
    assert compare_pixels("p", pixels, theirs[:2] + pixels[:1], images).differ == 0


@pytest.mark.parametrize(
    ("text", "same"), [("A  cat", True), ("é e\u0301", True), ("a &amp; b", False), ("schÃ¶n", False), ("ΟΔΟΣ", False)]
)
def test_plain_texts(text: str, same: bool) -> None:
    assert same_in_transformers(text) == same


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_square_rgb_images_keep_no_metadata() -> None:
    for image in map(square_rgb, sample_images(25)):
        assert image.mode == "RGB" and image.width == image.height and not image.info
