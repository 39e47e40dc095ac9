from __future__ import annotations

import os
import pathlib
import pickle

import pyarrow as pa
import pytest
from pyarrow import parquet

from tclip_jax.data.sources import BadSample, Source, open_source


def faults(source: Source) -> list[str]:
    found = []
    for i in range(len(source)):
        try:
            found.append(source[i].captions[0] if source[i].captions else "")
        except BadSample as error:
            found.append(f"! {error.kind}")
    return found


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_rows_of_csv_and_what_is_wrong_with_them(tmp_path: pathlib.Path, delimiter: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"A")
    rows = [b"id,filepath,title", b'1,images/a.png,"two, or\nthree"', b"2,,x", b"3,gone.png,x", b"4,images/a.png,\xff"]
    rows += [b"5,images,x", b"6," + str(tmp_path).encode() + b"/images/a.png,", b"7,\xff.png,x"]
    table = tmp_path / "t.csv"
    table.write_bytes(b"\n".join(rows).replace(b"two,", b"two;").replace(b",", delimiter.encode()))
    source = open_source(f"csv:{table}", "train")
    bad = ["! no_image", "! no_image", "! invalid_utf8", "! no_image", "", "! invalid_utf8"]
    assert faults(source) == ["two; or\nthree", *bad]
    assert source[0].image == b"A" and source[0].name == f"{tmp_path}/images/a.png"
    assert pickle.loads(pickle.dumps(source))[0] == source[0]


def test_paths_that_have_no_end_are_not_read(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "vast.png", "wb") as file:
        file.truncate((1 << 28) + 1)
    (tmp_path / "t.csv").write_text("filepath,title\n/dev/zero,a\npipe,b\nvast.png,c\nvast.png/a,d\n")
    source = open_source(f"csv:{tmp_path / 't.csv'}", "train")
    assert faults(source) == ["! unreadable", "! unreadable", "! too_large", "! no_image"]
    with pytest.raises(BadSample, match=r"/dev/zero: no regular file$"):
        source[0]


def test_parquet_has_lists_of_captions_and_chosen_columns(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.png").write_bytes(b"A")
    for i in range(2):
        table = pa.table({"where": ["a.png", "a.png"], "texts": [["a", "b"], None], "image": [f"{i}", "x"]})
        parquet.write_table(table, tmp_path / f"{i}.parquet")
    source = open_source(f"parquet:{tmp_path}/{{0..1}}.parquet?image=where", "train")
    assert [source[i].captions for i in range(4)] == [("a", "b"), (), ("a", "b"), ()]
    assert open_source(f"parquet:{tmp_path}/0.parquet?image=where&caption=image", "train")[1].captions == ("x",)


def test_a_table_that_changes_is_read_again(tmp_path: pathlib.Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("image,caption\na,b\n")
    first = open_source(f"csv:{table}", "train")
    table.write_text("image,caption\na,b\nc,d\n")
    second = open_source(f"csv:{table}", "train")
    assert (len(first), len(second)) == (1, 2) and first.digest != second.digest  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "spec", "message"),
    [
        ("a,caption\n", "", r"t\.csv: no column filepath or image or .* among a, caption; name it with \?image=COLUMN"),
        ("image,a\n", "", r"t\.csv: no column title or caption .* name it with \?caption=COLUMN"),
        ("image,a\n", "?caption=b", r"t\.csv: no column b among image, a"),
        ("image,caption\na,b\nc\n", "", r"t\.csv: .*Expected 2 columns, got 1"),
        ("", "", r"t\.csv: no column"),
        ("image,caption,alt\n", "?captions=alt", r"t\.csv\?captions=alt: 'captions=alt' is neither image=COLUMN"),
        ("image,caption\n", "?image=", r"'image=' is neither image=COLUMN nor caption=COLUMN"),
    ],
)
def test_what_is_refused(tmp_path: pathlib.Path, text: str, spec: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source(f"csv:{tmp_path}/t.csv{spec}", "train")


def test_no_table(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        open_source(f"csv:{tmp_path}/none.csv", "train")
    (tmp_path / "t.parquet").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"t\.parquet: .*[Pp]arquet"):
        open_source(f"parquet:{tmp_path}/t.parquet", "train")
    # As data sets of the Hugging Face hub have images: in the table.
    parquet.write_table(pa.table({"image": [{"bytes": b"x"}], "text": ["a"]}), tmp_path / "hub.parquet")
    with pytest.raises(ValueError, match=r"hub\.parquet: Unsupported cast from struct<bytes: binary>"):
        open_source(f"parquet:{tmp_path}/hub.parquet", "train")
