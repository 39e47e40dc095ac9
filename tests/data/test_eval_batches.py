"""Batches for evaluation: in order, padded, and divided among processes in blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from tclip_jax.data import images
from tclip_jax.data.eval_batches import eval_batches
from tclip_jax.data.images import Preprocess
from tclip_jax.data.sources import BadSample, Record, open_source
from tests.data.records import Records, labelled, png

PREPROCESS = Preprocess(8)


def test_records_are_in_order_and_the_last_batch_is_padded() -> None:
    source = open_source("digits", "test")
    batches = list(eval_batches(source, preprocess=Preprocess(16), batch_size=150))

    assert [batch["image"].shape for batch in batches] == [(150, 16, 16, 3)] * 3
    weight = np.concatenate([batch["weight"] for batch in batches])
    label = np.concatenate([batch["label"] for batch in batches])
    assert label.dtype == np.int32 and weight.dtype == np.float32
    assert weight.tolist() == [1] * 397 + [0] * 53
    assert label.tolist() == [source[i].label for i in range(397)] + [-1] * 53
    for row in (0, 149):
        pixels = images.preprocess(Image.fromarray(np.asarray(source[150 + row].image)), Preprocess(16))
        np.testing.assert_array_equal(batches[1]["image"][row], pixels)
    assert not batches[2]["image"][97:].any()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_divide_a_batch_in_blocks(count: int) -> None:
    source = labelled(21)
    indices: list[int] = []
    shares = [
        list(eval_batches(source, preprocess=PREPROCESS, batch_size=8, process_index=i, process_count=count))
        for i in range(count)
    ]
    assert [len(batches) for batches in shares] == [3] * count
    for batches in zip(*shares, strict=True):
        assert all(batch["image"].shape[0] == len(batch["name"]) == 8 // count for batch in batches)
        indices += [index for batch in batches for index in batch["index"].tolist()]
    assert indices == [*range(21), -1, -1, -1]


def test_padding_of_label_vectors_is_minus_one() -> None:
    vector = np.array([0, 1, 1], np.int32)
    (batch,) = eval_batches(Records([Record(png(9), (), vector, "x")]), preprocess=PREPROCESS, batch_size=2)
    assert batch["label"].tolist() == [[0, 1, 1], [-1, -1, -1]] and batch["name"] == ["x", ""]


def test_the_label_vector_of_an_unreadable_record_is_minus_one() -> None:
    class Unreadable(Records):
        def __getitem__(self, index: Any) -> Any:
            if index == 0:
                raise BadSample("unreadable", "x", "the disk failed")
            return super().__getitem__(index)

    source = Unreadable(Record(png(9), (), np.array([0, 1, 1], np.int32), "y") for _ in range(2))
    (batch,) = eval_batches(source, preprocess=PREPROCESS, batch_size=3)
    assert batch["label"].tolist() == [[-1, -1, -1], [0, 1, 1], [-1, -1, -1]] and batch["weight"].tolist() == [0, 1, 0]


def test_a_batch_that_processes_cannot_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="global batch 10 is not divisible by 4 processes"):
        eval_batches(labelled(2), preprocess=PREPROCESS, batch_size=10, process_count=4)


def test_all_captions_are_kept() -> None:
    source = Records([Record(png(9), ("a", "b"), -1, "pair"), Record(b"broken", ("c",), -1, "broken in evaluation")])
    (batch,) = eval_batches(source, preprocess=PREPROCESS, batch_size=3)
    assert batch["captions"] == [("a", "b"), ("c",), ()]
    assert batch["weight"].tolist() == [1, 0, 0]
    assert batch["label"].tolist() == [-1, -1, -1]
