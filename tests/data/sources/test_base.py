"""What data is: another digest for any other byte, the same one for a copy."""

from __future__ import annotations

import os
import pathlib
import pickle
import shutil
from collections.abc import Sequence

import numpy as np
import pytest

from tclip_jax.data.sources import BadSample, Record, Source, digest, open_source
from tests.data.sources.layouts import (
    CAPTIONS,
    IMAGES,
    LAYOUTS,
    UNCAPTIONED,
    Layout,
    files_of,
    labelled_folder,
    laid_out,
    prepared,
    shade_of,
    tars,
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_swapped_files_of_equal_names_sizes_and_times_are_other_data(layout: Layout, tmp_path: pathlib.Path) -> None:
    spec = laid_out(layout, tmp_path / "data", (1, 2, 3, 4))
    source = open_source(spec, "train")
    before, was = digest(source), files_of(tmp_path / "data")
    assert digest(open_source(spec, "train")) == digest(pickle.loads(pickle.dumps(source))) == before

    # What differs is one shade in one image, or one letter in one caption; the files take the places of the others.
    changed: list[tuple[tuple[int, ...], Sequence[str]]] = [((1, 2, 3, 5), CAPTIONS)]
    if layout not in UNCAPTIONED:
        changed.append(((1, 2, 3, 4), (*CAPTIONS[:3], "a tall free")))
    found = {before}
    for number, (shades, captions) in enumerate(changed):
        other = tmp_path / f"other{number}"
        laid_out(layout, other, shades, captions)
        assert files_of(other).keys() == was.keys()
        for name, status in was.items():
            assert (other / name).stat().st_size == status.st_size, name
            (tmp_path / "data" / name).write_bytes((other / name).read_bytes())
            os.utime(tmp_path / "data" / name, ns=(status.st_atime_ns, status.st_mtime_ns))
        found.add(digest(open_source(spec, "train")))
    assert len(found) == 1 + len(changed)

    # What is read is what is there now, and the first data again are the first data.
    laid_out(layout, tmp_path / "again", (1, 2, 3, 4))
    for name in was:
        (tmp_path / "data" / name).write_bytes((tmp_path / "again" / name).read_bytes())
    again = open_source(spec, "train")
    assert digest(again) == before
    assert sorted(shade_of(again[i]) for i in range(len(again) - IMAGES, len(again))) == [1, 2, 3, 4]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_in_another_place_is_the_same_data(
    layout: Layout, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = laid_out(layout, tmp_path / "data", (1, 2, 3, 4))
    before = digest(open_source(spec, "train"))
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere" / "copy")
    (tmp_path / "data").rename(tmp_path / "gone")
    monkeypatch.setenv("TCLIP_CACHE_DIR", str(tmp_path / "cache of another host"))
    assert digest(open_source(spec.replace("/data", "/elsewhere/copy"), "train")) == before


def test_a_class_by_another_name_a_slice_and_another_order_are_other_data(tmp_path: pathlib.Path) -> None:
    spec = laid_out(labelled_folder, tmp_path / "folder", (1, 2, 3, 4))
    before = digest(open_source(spec, "train"))
    (tmp_path / "folder" / "train" / "cat").rename(tmp_path / "folder" / "train" / "cow")
    renamed = digest(open_source(spec, "train"))
    (tmp_path / "folder" / "train" / "ant").mkdir()  # an empty class moves the labels of the others
    assert len({before, renamed, digest(open_source(spec, "train"))}) == 3

    spec = laid_out(prepared, tmp_path / "tfds", (1, 2, 3, 4))
    parts = {digest(open_source(spec, split)) for split in ("train", "train[:3]", "train[1:]")}
    assert len(parts) == 3

    spec = laid_out(tars, tmp_path / "tars", (1, 2, 3, 4)).partition("{")[0]
    orders = {digest(open_source(f"{spec}{{{order}}}.tar", "train")) for order in ("0,1", "1,0")}
    assert len(orders) == 2
    assert len({digest(open_source("digits", split)) for split in ("train", "test")}) == 2
    assert len({digest(open_source(f"mixture:{weight}*digits+1*digits", "train")) for weight in (1, 2)}) == 2


def test_a_source_of_any_other_kind_is_told_by_its_records() -> None:
    class Own:
        classnames = ("cat", "dog")

        def __init__(self, *records: Record | None) -> None:
            self._records = records

        def __len__(self) -> int:
            return len(self._records)

        def __getitem__(self, index: int) -> Record:
            record = self._records[index]
            if record is None:
                raise BadSample("no_image", "x", "none")
            return record

    pixels = np.zeros((2, 3, 3), np.uint8)
    records: list[Record | None] = [
        Record(b"image", ("a", "b"), 0, "x"),
        Record(b"imagf", ("a", "b"), 0, "x"),
        Record(b"image", ("ab",), 0, "x"),
        Record(b"image", ("a", "b"), 1, "x"),
        Record(pixels, (), 0, "x"),
        Record(pixels.reshape(3, 2, 3), (), 0, "x"),
        Record(pixels, (), np.array([0, 1]), "x"),
        None,
    ]
    sources: list[Source] = [Own(record) for record in records]
    assert len({digest(source) for source in sources}) == len(records)
    assert digest(Own(records[0])) == digest(Own(Record(b"image", ("a", "b"), 0, "another name")))
