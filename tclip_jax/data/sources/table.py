"""Tables of images and captions: CSV, TSV and Parquet files."""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
from pyarrow import parquet

from tclip_jax import keys
from tclip_jax.data.files import compression
from tclip_jax.data.sources.base import MAX_SAMPLE_BYTES, BadSample, Record
from tclip_jax.data.sources.content import combined, contents, stamps
from tclip_jax.data.sources.patterns import find_files
from tclip_jax.data.sources.remote import open_file, read_file
from tclip_jax.data.sources.tar import OPEN_CLIP_ORDER
from tclip_jax.pages import printable
from tclip_jax.storage import atomic_file, cache_folder, write_atomic

# open_clip's defaults are filepath and title.
_IMAGE_COLUMNS = (
    *("filepath", "image", "path", "file", "file_name", "filename", "image_path", "url"),
    *("img", *OPEN_CLIP_ORDER),
)
_CAPTION_COLUMNS = ("title", "caption", "text", "captions", "texts", "txt")

_MAX_LINE = 1 << 24  # characters
_CSV_ROWS, _PARQUET_ROWS = 1 << 13, 1 << 8  # that are in memory together; a row of Parquet may hold an image
_MAX_NOTES = 10
_TEXT, _TEXTS = pa.large_binary(), pa.large_list(pa.large_binary())
# The path of an image or, as data sets of the Hugging Face hub have it, its bytes, and then a path is only its name.
_SCHEMA = pa.schema([("path", _TEXT), ("bytes", _TEXT), ("captions", _TEXTS)])


def open_csv(argument: str, split: str) -> Table:
    """The rows of CSV or TSV files; they have no splits."""
    return Table(_cached(argument, "csv"))


def open_parquet(argument: str, split: str) -> Table:
    """The rows of Parquet files; they have no splits."""
    return Table(_cached(argument, "parquet"))


class Table:
    """A row of a table is a sample: the path or URL of an image, and its caption.

    In Parquet it may be the image itself, as bytes or as the Hugging Face hub's struct of `bytes` and `path`, and a
    list of captions. The columns are the first of `filepath`, `image`, `path`, `file`, `file_name`, `filename`,
    `image_path`, `url`, `img`, `jpg`, `png`, `jpeg`, `webp` and of `title`, `caption`, `text`, `captions`, `texts`,
    `txt` that there are, or what `?image=…&caption=…` after the path names. A path that is not absolute is read from
    the folder of its table. Both columns are copied into the cache folder once, and mapped from there: a table takes
    no memory, in no worker. `notes` says which lines of a CSV file are blank or go on in the next.

    Raises:
      FileNotFoundError: no such table.
      ValueError: a table without rows, without these columns, with other things in them, or that cannot be parsed;
        one line with the line or the column.
    """

    classnames: tuple[str, ...] = ()

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path

    def __len__(self) -> int:
        return self._rows.num_rows

    def __reduce__(self) -> tuple[Any, ...]:
        return Table, (self._path,)

    def __getitem__(self, index: int) -> Record:
        path, data, captions = (self._rows[i][index].as_py() for i in range(3))
        name = printable((path or b"").decode("utf-8", "replace"))
        name = f"row {index}" if not name else f"{name} (row {index})" if data is not None else name
        if not (data or path):
            raise BadSample("no_image", name, "its row has none")
        if data and len(data) > MAX_SAMPLE_BYTES:
            raise BadSample("too_large", name, f"{len(data):,} bytes, more than {MAX_SAMPLE_BYTES:,}")
        texts = tuple(_decode(text, name) for text in captions or () if text)
        try:
            return Record(data or read_file(_decode(path, name)), texts, -1, name)
        except BadSample as error:
            missing = isinstance(error.__cause__, (FileNotFoundError, IsADirectoryError, NotADirectoryError))
            raise BadSample("no_image", name, "no such file") if missing else error from None

    @functools.cached_property
    def digest(self) -> str:
        """Of captions and of the contents of images, in the order of the rows; of no path."""
        batches = self._rows.to_batches()
        rows = (
            row for batch in batches for row in zip(batch[0].to_pylist(), batch[1].is_null().to_pylist(), strict=True)
        )
        files = contents((os.fsdecode(path or b"") for path, is_file in rows if is_file), max_bytes=MAX_SAMPLE_BYTES)
        inside = (data for batch in batches for data in batch[1].to_pylist())
        images = (next(files) if data is None else hashlib.blake2b(data, digest_size=16).hexdigest() for data in inside)
        captions = (row or [] for batch in batches for row in batch[2].to_pylist())
        return combined(
            part for image, row in zip(images, captions, strict=True) for part in (image, *map(_as_text, row), "")
        )

    @functools.cached_property
    def notes(self) -> list[str]:
        """What the tables have that is not read, or looks like a mistake."""
        return json.loads(self._path.with_suffix(".json").read_text())

    @functools.cached_property
    def _rows(self) -> pa.Table:
        with pa.memory_map(str(self._path)) as file:
            return pa.ipc.open_file(file).read_all()


def _as_text(caption: bytes | None) -> str:
    return (caption or b"").decode("utf-8", "surrogateescape")


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadSample("invalid_utf8", name, f"not UTF-8 at byte {error.start}") from None


def _cached(argument: str, kind: str) -> pathlib.Path:
    """The Arrow file of both columns of the tables, with the notes beside it, made now if it is not there."""
    pattern, chosen = _options(argument)
    tables = find_files(pattern)
    made_by = {"kind": kind, "columns": chosen, "tables": tables, "stamps": stamps(tables), "schema": str(_SCHEMA)}
    key = keys.digest(made_by)
    target = cache_folder() / "tables" / f"{key}.arrow"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        notes, rows = list[str](), 0
        with atomic_file(target) as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            for path in tables:
                before = rows
                for batch in _batches(path, kind, chosen, notes):
                    writer.write_batch(batch)
                    rows += len(batch)
                if rows == before:
                    notes.append(f"{path}: no rows")
            if not rows:
                raise ValueError(notes[-1] + (f", as of the other {len(tables) - 1:,} tables" if tables[1:] else ""))
            more = [f"and {len(notes) - _MAX_NOTES:,} lines more of this kind"] if len(notes) > _MAX_NOTES else []
            write_atomic(target.with_suffix(".json"), json.dumps([*notes[:_MAX_NOTES], *more]))
    return target


def _options(argument: str) -> tuple[str, dict[str, str]]:
    """The pattern, and the columns that a `?image=…&caption=…` after it names."""
    pattern, _, options = argument.partition("?")
    chosen = {}
    for option in options.split("&") if options else ():
        key, _, column = option.partition("=")
        if key not in ("image", "caption") or not column:
            raise ValueError(f"{argument}: {option!r} is neither image=COLUMN nor caption=COLUMN")
        chosen[key] = column
    return pattern, chosen


def _batches(path: str, kind: str, chosen: dict[str, str], notes: list[str]) -> Iterator[pa.RecordBatch]:
    folder, told = path.rpartition("/")[0].encode(), list[str]()
    try:
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(open_file(path))
            if packed := compression(file.read(8)):
                raise ValueError(f"compressed with {packed}")
            file.seek(0)
            if kind == "csv":  # every byte is one character
                file = stack.enter_context(io.TextIOWrapper(file, encoding="latin-1", newline=""))
            for images, inside, captions in (_csv if kind == "csv" else _parquet)(file, chosen, told):
                here = [
                    name if data is not None or not name or _is_absolute(name) else b"/".join((folder, name))
                    for name, data in zip(images, inside, strict=True)
                ]
                columns = (here, inside, [each if isinstance(each, list) else [each] for each in captions])
                arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
                yield pa.record_batch(arrays, _SCHEMA)
    except (ValueError, csv.Error, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of the file system; Arrow's own errors about a damaged file are OSErrors without a number
        raise ValueError(f"{path}: {printable(' '.join(str(error).split()))[:300]}") from None
    notes += [f"{path}: {note}" for note in told]


class _Lines(Iterator[str]):
    """The lines of a table, ended by \\n, \\r\\n or \\r.

    Attributes:
      ended: whether another line was asked for after the last.
    """

    def __init__(self, text: IO[str]) -> None:
        self._text, self._number, self.ended = text, 0, False

    def __next__(self) -> str:
        line = self._text.readline(_MAX_LINE)
        self._number += 1
        if not line:
            self.ended = True
            raise StopIteration
        if self._number == 1 and line[:2] in ("\xff\xfe", "\xfe\xff"):
            raise ValueError("it is UTF-16: convert it to UTF-8 (iconv -f utf-16 -t utf-8)")
        if len(line) == _MAX_LINE or "\0" in line or (self._number == 1 and re.search(r"[\x01-\x08\x0e-\x1f]", line)):
            what = f"has {_MAX_LINE:,} characters or more" if len(line) == _MAX_LINE else "has control characters"
            raise ValueError(f"line {self._number} {what}: no table of text")
        return line.removeprefix("\xef\xbb\xbf") if self._number == 1 else line


_Columns = tuple[list[Any], list[Any], list[Any]]


def _csv(text: IO[str], chosen: dict[str, str], notes: list[str]) -> Iterator[_Columns]:
    """Columns as bytes: a caption that is not UTF-8 costs its row, not the table."""
    lines = _Lines(text)
    if not (header := next(lines, "")):
        raise ValueError("an empty file")
    reader = csv.reader(itertools.chain([header], lines), delimiter="\t" if "\t" in header else ",")
    names = next(reader, [])
    image, caption = (names.index(name) for name in _columns(names, chosen, notes))
    images, captions, blank, several = list[bytes](), list[bytes](), list[int](), list[int]()
    while True:
        start = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"line {reader.line_num}: {error}; is a quote that opens in line {start} closed?"
            ) from None
        if row is None:
            break
        if lines.ended:
            raise ValueError(f"line {start}: a quote that opens there is not closed before the end of the table")
        if len(row) < 2 and not "".join(row).strip():
            blank.append(start)
            continue
        if len(row) != len(names):
            raise ValueError(f"line {start}: {len(row)} columns, where the header has {len(names)}")
        if reader.line_num > start:
            several.append(start)
        images.append(row[image].encode("latin-1"))
        captions.append(row[caption].encode("latin-1"))
        if len(images) == _CSV_ROWS:
            yield images, [None] * len(images), captions
            images, captions = [], []
    if images:
        yield images, [None] * len(images), captions
    if blank:
        notes.append(f"blank lines passed over: {len(blank):,}; first line {blank[0]}")
    if several:
        notes.append(
            f"rows that go on in the next line, with a caption of several lines or a quote that is closed rows later: "
            f"{len(several):,}; first line {several[0]}"
        )


def _parquet(file: IO[bytes], chosen: dict[str, str], notes: list[str]) -> Iterator[_Columns]:
    table = parquet.ParquetFile(file)
    schema = table.schema_arrow
    image, caption = _columns(schema.names, chosen, notes)
    kind, inside = schema.field(image).type, False
    fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    struct = "bytes" in fields and _is_bytes(fields["bytes"]) and _is_text(fields.get("path", pa.string()))
    if not (struct or _is_text(kind) or (inside := _is_bytes(kind))):
        raise ValueError(f"column {image!r} is {kind}: an image is a path, its bytes, or a struct of bytes and path")
    texts = schema.field(caption).type
    if not (_is_text(_item(texts)) or _is_bytes(_item(texts))):
        raise ValueError(f"column {caption!r} is {texts}: a caption is text, or a list of texts")
    for batch in table.iter_batches(_PARQUET_ROWS, columns=[image, caption]):
        found = batch.column(image)
        rows = found.to_pylist() if struct else found.cast(_TEXT).to_pylist()
        nothing = [None] * len(rows)
        if struct:
            paths = [row and row.get("path") and row["path"].encode() for row in rows]
            data = [row and (row["bytes"] or None) for row in rows]
        else:
            paths, data = (nothing, rows) if inside else (rows, nothing)
        yield paths, data, batch.column(caption).cast(_TEXTS if _item(texts) != texts else _TEXT).to_pylist()


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _item(kind: pa.DataType) -> pa.DataType:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return kind.value_type if lists else kind


def _columns(names: Sequence[str], chosen: dict[str, str], notes: list[str]) -> list[str]:
    found = []
    for key, known in (("image", _IMAGE_COLUMNS), ("caption", _CAPTION_COLUMNS)):
        wanted = (chosen[key],) if key in chosen else known
        there = [name for name in wanted if name in names]
        if not there:
            shown = ", ".join(names)[:100]
            raise ValueError(f"no column {' or '.join(wanted)} among {shown}; name it with ?{key}=COLUMN")
        if names.count(there[0]) > 1:
            raise ValueError(f"{names.count(there[0])} columns are called {there[0]!r}")
        if others := there[1:]:
            notes.append(f"{key}s are of column {there[0]!r}, not of {', '.join(others)}; ?{key}=COLUMN names another")
        found.append(there[0])
    return found


def _is_absolute(path: bytes) -> bool:
    return path.startswith(b"/") or b"://" in path
