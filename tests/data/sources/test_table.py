from __future__ import annotations

import gzip
import os
import pathlib
import pickle

import pyarrow as pa
import pytest
from pyarrow import parquet

from tclip_jax.data.sources import BadSample, Source, open_source


def faults(source: Source) -> list[str]:
    result = []
    for i in range(len(source)):
        try:
            result.append(source[i].captions[0] if source[i].captions else "")
        except BadSample as error:
            result.append(f"! {error.kind}")
    return result


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_rows_of_csv_and_their_faults(tmp_path: pathlib.Path, delimiter: str) -> None:
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


def test_endless_and_too_large_files_are_not_read(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "vast.png", "wb") as file:
        file.truncate((1 << 28) + 1)
    (tmp_path / "t.csv").write_text("filepath,title\n/dev/zero,a\npipe,b\nvast.png,c\nvast.png/a,d\n")
    source = open_source(f"csv:{tmp_path / 't.csv'}", "train")
    assert faults(source) == ["! unreadable", "! unreadable", "! too_large", "! no_image"]
    with pytest.raises(BadSample, match=r"/dev/zero: not a regular file$"):
        source[0]


def test_parquet_with_lists_of_captions_and_selected_columns(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.png").write_bytes(b"A")
    for i in range(2):
        table = pa.table({"where": ["a.png", "a.png"], "texts": [["a", "b"], None], "image": [f"{i}", "x"]})
        parquet.write_table(table, tmp_path / f"{i}.parquet")
    source = open_source(f"parquet:{tmp_path}/{{0..1}}.parquet?image=where", "train")
    assert [source[i].captions for i in range(4)] == [("a", "b"), (), ("a", "b"), ()]
    assert open_source(f"parquet:{tmp_path}/0.parquet?image=where&caption=image", "train")[1].captions == ("x",)


def test_a_changed_table_is_read_again(tmp_path: pathlib.Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("image,caption\na,b\n")
    first = open_source(f"csv:{table}", "train")
    table.write_text("image,caption\na,b\nc,d\n")
    second = open_source(f"csv:{table}", "train")
    assert (len(first), len(second)) == (1, 2) and first.digest != second.digest  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "spec", "message"),
    [
        (
            "a,caption\n",
            "",
            r"t\.csv: no column filepath or image or .* among a, caption; select one with \?image=COLUMN",
        ),
        ("image,a\n", "", r"t\.csv: no column title or caption .* select one with \?caption=COLUMN"),
        ("image,a\n", "?caption=b", r"t\.csv: no column b among image, a"),
        ("image,caption\na,b\nc\n", "", r"t\.csv: line 3: 1 columns; the header has 2$"),
        ("image,caption\na,b,c\n", "", r"t\.csv: line 2: 3 columns; the header has 2$"),
        ("", "", r"t\.csv: an empty file$"),
        ("image,caption\n", "", r"t\.csv: no rows$"),
        ("image,caption\n\n \n", "", r"t\.csv: no rows$"),
        ("image,caption,caption\na,b,c\n", "", r"t\.csv: 2 columns have the name 'caption'$"),
        ("image,caption\na,b\0c\n", "", r"t\.csv: line 2 has control characters: not a table of text$"),
        ("\x1bPNG\n", "", r"t\.csv: line 1 has control characters: not a table of text$"),
        (
            'image,caption\na,b\nc,"d\ne,f\ng,h\n',
            "",
            r"t\.csv: line 3: the quote that opens there is never closed$",
        ),
        (f'image,caption\na,"{"b" * 131_073}\n', "", r"t\.csv: line 2: field larger .* a quote that opens in line 2"),
        ("image,caption,alt\n", "?captions=alt", r"t\.csv\?captions=alt: 'captions=alt' is neither image=COLUMN"),
        ("image,caption\n", "?image=", r"'image=' is neither image=COLUMN nor caption=COLUMN"),
    ],
)
def test_invalid_csv_tables_are_refused(tmp_path: pathlib.Path, text: str, spec: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source(f"csv:{tmp_path}/t.csv{spec}", "train")


def test_missing_and_unreadable_tables_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        open_source(f"csv:{tmp_path}/none.csv", "train")
    (tmp_path / "t.parquet").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"t\.parquet: .*[Pp]arquet"):
        open_source(f"parquet:{tmp_path}/t.parquet", "train")
    for data, message in (
        (gzip.compress(b"image,caption\na,b\n"), "compressed with gzip"),
        ("a,b\n".encode("utf-16"), "UTF-16"),
    ):
        (tmp_path / "t.csv").write_bytes(data)
        with pytest.raises(ValueError, match=rf"t\.csv: .*{message}"):
            open_source(f"csv:{tmp_path}/t.csv", "train")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_rows_equal_pandas(tmp_path: pathlib.Path, end: str, mark: str) -> None:
    pandas = pytest.importorskip("pandas")
    (tmp_path / "a.png").write_bytes(b"A")
    lines = [
        "title,n,filepath",
        "two words,1,a.png",
        "",
        '"a ""quoted"" one, with a comma",2,a.png',
        '12" wide,3,a.png',
    ]
    lines += ['"Big" dog,4,a.png', "u\u2028v\x0bw\x85x,5,a.png", "NULL?,6,a.png"]
    (tmp_path / "t.csv").write_bytes((mark + end.join(lines) + end).encode())
    source = open_source(f"csv:{tmp_path}/t.csv", "train")
    expected = pandas.read_csv(tmp_path / "t.csv", encoding="utf-8-sig")["title"].tolist()
    assert [source[i].captions[0] for i in range(len(source))] == expected and len(expected) == 6
    assert source.notes == [f"{tmp_path}/t.csv: blank lines skipped: 1; first line 3"]  # type: ignore[attr-defined]


def test_rows_of_several_lines_are_counted(tmp_path: pathlib.Path) -> None:
    pandas = pytest.importorskip("pandas")
    (tmp_path / "a.png").write_bytes(b"A")
    (tmp_path / "t.csv").write_text('filepath,title\na.png,x\na.png,"y\na.png,z\na.png,w"\na.png,v\n')
    source = open_source(f"csv:{tmp_path}/t.csv", "train")
    assert [source[i].captions[0] for i in range(3)] == pandas.read_csv(tmp_path / "t.csv")["title"].tolist()
    note = "rows that continue on the next line (a caption with line breaks, or a quote that is closed rows later): 1"
    assert source.notes == [f"{tmp_path}/t.csv: {note}; first line 3"]  # type: ignore[attr-defined]
    # The notes are the same when the cached table is opened, and cover several tables.
    (tmp_path / "empty.csv").write_text("filepath,title\n")
    for _ in range(2):
        both = open_source(f"csv:{tmp_path}/{{empty,t}}.csv", "train")
        assert len(both) == 3 and both.notes == [f"{tmp_path}/empty.csv: no rows", *source.notes]  # type: ignore[attr-defined]


HUB = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (pa.array([{"bytes": b"B", "path": "x.jpg"}, {"bytes": None, "path": "a.png"}, None], HUB), [b"B", b"A", None]),
        (pa.array([{"bytes": b"B"}, None, {"bytes": b""}]), [b"B", None, None]),
        (pa.array([b"B", b"C", None]), [b"B", b"C", None]),
        (pa.array([b"B", b"C", None], pa.large_binary()), [b"B", b"C", None]),
        (pa.array(["a.png", "none.png", None]).dictionary_encode(), [b"A", None, None]),
        (pa.array(["a.png", "a.png", ""], pa.large_string()), [b"A", b"A", None]),
    ],
)
@pytest.mark.parametrize(
    ("captions", "texts"),
    [
        (pa.array(["a", None, "c"]).dictionary_encode(), [("a",), (), ("c",)]),
        (pa.array([["a", "b"], None, ["c", "d"]], pa.list_(pa.string(), 2)), [("a", "b"), (), ("c", "d")]),
        (pa.array([["a"], [], [None]], pa.large_list(pa.string())), [("a",), (), ()]),
        (pa.array([b"a", b"b", b"c"]), [("a",), ("b",), ("c",)]),
    ],
)
def test_parquet_with_embedded_images_and_captions_of_any_type(
    tmp_path: pathlib.Path,
    images: pa.Array,
    expected: list[bytes | None],
    captions: pa.Array,
    texts: list[tuple[str, ...]],
) -> None:
    (tmp_path / "a.png").write_bytes(b"A")
    parquet.write_table(pa.table({"image": images, "text": captions}), tmp_path / "t.parquet")
    source = open_source(f"parquet:{tmp_path}/t.parquet", "train")
    assert len(source) == 3 and pickle.loads(pickle.dumps(source)).notes == []
    for i, (image, text) in enumerate(zip(expected, texts, strict=True)):
        if image is None:
            with pytest.raises(BadSample) as error:
                source[i]
            assert error.value.kind == "no_image" and error.value.name
        else:
            assert (source[i].image, source[i].captions) == (image, text)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("text", pa.array([3]), r"t\.parquet: column 'text' is int64: expected texts or lists of texts$"),
        ("text", pa.array([[3]]), r"column 'text' is list<.*int64>: expected texts"),
        ("text", pa.array([{"raw": "a"}]), r"column 'text' is struct<raw: string>: expected texts"),
        ("image", pa.array([3]), r"column 'image' is int64: expected paths, bytes, or a struct"),
        ("image", pa.array([["a.png"]]), r"column 'image' is list<.*string>: expected paths"),
        ("image", pa.array([{"path": "a.png"}]), r"column 'image' is struct<path: string>: expected paths"),
        ("image", pa.array([], pa.string()), r"t\.parquet: no rows$"),
    ],
)
def test_columns_of_other_types_are_refused(
    tmp_path: pathlib.Path, column: str, values: pa.Array, message: str
) -> None:
    good = {"image": pa.array(["a.png"] * len(values)), "text": pa.array(["a"] * len(values))}
    parquet.write_table(pa.table(good | {column: values}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=message):
        open_source(f"parquet:{tmp_path}/t.parquet", "train")


def test_the_notes_name_the_column_in_use(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.png").write_bytes(b"A")
    (tmp_path / "t.csv").write_text("caption,filepath,title\nb,a.png,c\n")
    source = open_source(f"csv:{tmp_path}/t.csv", "train")
    assert source[0].captions == ("c",)  # as in open_clip
    note = "captions are read from column 'title', not caption; ?caption=COLUMN selects another"
    assert source.notes == [f"{tmp_path}/t.csv: {note}"]  # type: ignore[attr-defined]
    other = open_source(f"csv:{tmp_path}/t.csv?caption=caption", "train")
    assert other[0].captions == ("b",) and other.notes == []  # type: ignore[attr-defined]
