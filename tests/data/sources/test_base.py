"""The digest of data changes with any byte and is equal for a copy."""

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
def test_replaced_files_of_equal_names_sizes_and_times_change_the_digest(
    layout: Layout, tmp_path: pathlib.Path
) -> None:
    spec = laid_out(layout, tmp_path / "data", (1, 2, 3, 4))
    source = open_source(spec, "train")
    before, original = digest(source), files_of(tmp_path / "data")
    assert digest(open_source(spec, "train")) == digest(pickle.loads(pickle.dumps(source))) == before

    # One shade of one image, or one letter of one caption, differs; the new files replace the others.
    changed: list[tuple[tuple[int, ...], Sequence[str]]] = [((1, 2, 3, 5), CAPTIONS)]
    if layout not in UNCAPTIONED:
        changed.append(((1, 2, 3, 4), (*CAPTIONS[:3], "a tall free")))
    digests = {before}
    for number, (shades, captions) in enumerate(changed):
        new = tmp_path / f"new{number}"
        laid_out(layout, new, shades, captions)
        assert files_of(new).keys() == original.keys()
        for name, status in original.items():
            assert (new / name).stat().st_size == status.st_size, name
            (tmp_path / "data" / name).write_bytes((new / name).read_bytes())
            os.utime(tmp_path / "data" / name, ns=(status.st_atime_ns, status.st_mtime_ns))
        digests.add(digest(open_source(spec, "train")))
    assert len(digests) == 1 + len(changed)

    # The restored files have the first digest, and their records are read.
    laid_out(layout, tmp_path / "again", (1, 2, 3, 4))
    for name in original:
        (tmp_path / "data" / name).write_bytes((tmp_path / "again" / name).read_bytes())
    again = open_source(spec, "train")
    assert digest(again) == before
    assert sorted(shade_of(again[i]) for i in range(len(again) - IMAGES, len(again))) == [1, 2, 3, 4]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_has_the_same_digest(layout: Layout, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = laid_out(layout, tmp_path / "data", (1, 2, 3, 4))
    before = digest(open_source(spec, "train"))
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere" / "copy")
    (tmp_path / "data").rename(tmp_path / "gone")
    monkeypatch.setenv("TCLIP_CACHE_DIR", str(tmp_path / "cache of another host"))
    assert digest(open_source(spec.replace("/data", "/elsewhere/copy"), "train")) == before


def test_class_names_slices_and_order_change_the_digest(tmp_path: pathlib.Path) -> None:
    spec = laid_out(labelled_folder, tmp_path / "folder", (1, 2, 3, 4))
    before = digest(open_source(spec, "train"))
    (tmp_path / "folder" / "train" / "cat").rename(tmp_path / "folder" / "train" / "cow")
    renamed = digest(open_source(spec, "train"))
    (tmp_path / "folder" / "train" / "ant").mkdir()  # an empty class shifts the labels of the others
    assert len({before, renamed, digest(open_source(spec, "train"))}) == 3

    spec = laid_out(prepared, tmp_path / "tfds", (1, 2, 3, 4))
    parts = {digest(open_source(spec, split)) for split in ("train", "train[:3]", "train[1:]")}
    assert len(parts) == 3

    spec = laid_out(tars, tmp_path / "tars", (1, 2, 3, 4)).partition("{")[0]
    orders = {digest(open_source(f"{spec}{{{order}}}.tar", "train")) for order in ("0,1", "1,0")}
    assert len(orders) == 2
    assert len({digest(open_source("digits", split)) for split in ("train", "test")}) == 2
    assert len({digest(open_source(f"mixture:{weight}*digits+1*digits", "train")) for weight in (1, 2)}) == 2


def test_the_digest_of_a_custom_source_is_of_its_records() -> None:
    class Custom:
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
    sources: list[Source] = [Custom(record) for record in records]
    assert len({digest(source) for source in sources}) == len(records)
    assert digest(Custom(records[0])) == digest(Custom(Record(b"image", ("a", "b"), 0, "another name")))
