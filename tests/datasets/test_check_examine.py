from __future__ import annotations

import numpy as np
import pytest

from tclip_jax.data.sources import BadSample, Record
from tclip_jax.datasets.check import examine


class Labelled(list[Record]):
    classnames = ("cat", "dog")


def source(label: int | np.ndarray) -> Labelled:
    return Labelled([Record(np.zeros((4, 4, 3), np.uint8), (), label, "x")])


def test_a_label_stands_for_captions_where_they_are_not_asked_for() -> None:
    assert examine(source(1), 0, captioned=False)[0].label == 1
    with pytest.raises(BadSample, match=r"x: no caption$"):
        examine(source(1), 0)


@pytest.mark.parametrize("label", [-1, 2, np.array([0, 1], np.int32)])
def test_a_label_that_training_cannot_name_stands_for_none(label: int | np.ndarray) -> None:
    with pytest.raises(BadSample, match="x: no caption and no valid label"):
        examine(source(label), 0, captioned=False)
