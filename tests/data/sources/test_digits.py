from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from tclip_jax.data.sources import open_source


@pytest.mark.parametrize(("split", "part"), [("train", slice(None, 1400)), ("test", slice(1400, None))])
def test_splits_are_a_fixed_order_of_sklearns_digits(split: str, part: slice) -> None:
    digits = load_digits()
    order = sorted(range(1797), key=lambda i: i * 2654435761 % 2**32)[part]

    source = open_source("digits", split)

    assert len(source) == len(order) == {"train": 1400, "test": 397}[split]
    for row in (0, 1, len(order) - 1):
        record = source[row]
        assert isinstance(record.image, np.ndarray)
        assert record.image.shape == (8, 8, 3) and record.image.dtype == np.uint8
        np.testing.assert_array_equal(record.image[..., 2], np.rint(digits.images[order[row]] * 255 / 16))
        assert (record.label, record.captions) == (digits.target[order[row]], ())


def test_both_splits_have_every_class() -> None:
    for split, fewest, most in (("train", 120, 150), ("test", 30, 55)):
        source = open_source("digits", split)
        counts = np.bincount([source[i].label for i in range(len(source))], minlength=len(source.classnames))
        assert len(counts) == 10 and counts.min() >= fewest and counts.max() <= most


def test_classnames_and_names() -> None:
    source = open_source("digits", "test")
    assert source.classnames[0] == "zero" and source.classnames[9] == "nine"
    assert source[3].name == "digits/test/3"


@pytest.mark.parametrize(
    ("spec", "split", "message"),
    [
        ("digits", "validation", "no split 'validation'; it has train, test"),
        ("digits:8x8", "train", "digits:8x8: digits takes no argument"),
        ("digts", "train", "^unknown data source 'digts': the nearest is digits$"),
        ("folders:/a", "train", "^unknown data source 'folders:/a': the nearest is folder:<path>$"),
        ("imagenet", "train", r"unknown data source 'imagenet': write one of arrayrecord:<files>, csv:<files>, digits"),
    ],
)
def test_invalid_specs_are_refused(spec: str, split: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(spec, split)
