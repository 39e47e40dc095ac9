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
from tclip_jax.data.sources.base import MAX_SAMPLE_BYTES, OPEN_CLIP_ORDER, BadSample, Record
from tclip_jax.data.sources.content import combined, contents, stamps
from tclip_jax.data.sources.patterns import find_files
from tclip_jax.data.sources.remote import open_file, read_file
from tclip_jax.pages import printable
from tclip_jax.storage import atomic_file, cache_folder, write_atomic

# open_clip's defaults are filepath and title.
_IMAGE_COLUMNS = (
    *("filepath", "image", "path", "file", "file_name", "filename", "image_path", "url"),
    *("img", *OPEN_CLIP_ORDER),
)
_CAPTION_COLUMNS = ("title", "caption", "text", "captions", "texts", "txt")

_MAX_LINE = 1 << 24  # characters
_CSV_ROWS, _PARQUET_ROWS = 1 << 13, 1 << 8  # in memory at a time; a row of Parquet may contain an image
_MAX_NOTES = 10
_TEXT, _TEXTS = pa.large_binary(), pa.large_list(pa.large_binary())
# A row has the path of an image, or its bytes as on the Hugging Face hub; the path is then only a name.
_SCHEMA = pa.schema([("path", _TEXT), ("bytes", _TEXT), ("captions", _TEXTS)])


def open_csv(argument: str, split: str) -> Table:
    """Open the rows of CSV or TSV files; `split` is ignored."""
    return Table(_cached(argument, "csv"))


def open_parquet(argument: str, split: str) -> Table:
    """Open the rows of Parquet files; `split` is ignored."""
    return Table(_cached(argument, "parquet"))


class Table:
    """The rows of tables: each is a sample with the path or URL of an image, and its caption.

    A Parquet file may contain the images, as bytes or as the Hugging Face hub's struct of `bytes` and `path`, and lists
    of captions. The columns are the first that exists of `filepath`, `image`, `path`, `file`, `file_name`, `filename`,
    `image_path`, `url`, `img`, `jpg`, `png`, `jpeg`, `webp`, and of `title`, `caption`, `text`, `captions`, `texts`,
    `txt`; `?image=COLUMN&caption=COLUMN` after the path selects others. Relative paths of images start at the folder of
    the table. Both columns are copied into an Arrow file in the cache folder once. The file is memory-mapped, so a
    table takes no memory in any process. `notes` counts blank lines and rows of several lines in CSV files.

    Args:
      path: the Arrow file; its notes are in the .json file beside it.
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
            raise BadSample("no_image", name, "the row has no image")
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
        """Digest of the captions and the contents of the images, in the order of the rows; paths are not included."""
        batches = self._rows.to_batches()
        rows = (
            row for batch in batches for row in zip(batch[0].to_pylist(), batch[1].is_null().to_pylist(), strict=True)
        )
        files = contents((os.fsdecode(path or b"") for path, is_file in rows if is_file), max_bytes=MAX_SAMPLE_BYTES)
        embedded = (data for batch in batches for data in batch[1].to_pylist())
        images = (
            next(files) if data is None else hashlib.blake2b(data, digest_size=16).hexdigest() for data in embedded
        )
        captions = (row or [] for batch in batches for row in batch[2].to_pylist())
        return combined(
            part for image, row in zip(images, captions, strict=True) for part in (image, *map(_as_text, row), "")
        )

    @functools.cached_property
    def notes(self) -> list[str]:
        """Lines about parts of the tables that are not used, and likely mistakes."""
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
    """Return the Arrow file of tables; write it and the notes beside it if it does not exist.

    Raises:
      FileNotFoundError: a table does not exist.
      ValueError: a table has no rows, lacks a column, has columns of other types, or cannot be parsed. The message is
        one line and names the table and the line or the column.
    """
    pattern, selected = _options(argument)
    tables = find_files(pattern)
    made_by = {"kind": kind, "columns": selected, "tables": tables, "stamps": stamps(tables), "schema": str(_SCHEMA)}
    key = keys.digest(made_by)
    target = cache_folder() / "tables" / f"{key}.arrow"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        notes, rows = list[str](), 0
        with atomic_file(target) as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            for path in tables:
                before = rows
                for batch in _batches(path, kind, selected, notes):
                    writer.write_batch(batch)
                    rows += len(batch)
                if rows == before:
                    notes.append(f"{path}: no rows")
            if not rows:
                raise ValueError(
                    notes[-1] + (f"; the other {len(tables) - 1:,} tables have none either" if tables[1:] else "")
                )
            more = [f"and {len(notes) - _MAX_NOTES:,} more notes on the tables"] if len(notes) > _MAX_NOTES else []
            write_atomic(target.with_suffix(".json"), json.dumps([*notes[:_MAX_NOTES], *more]))
    return target


def _options(argument: str) -> tuple[str, dict[str, str]]:
    """Return the pattern, and the columns in `?image=…&caption=…` after it."""
    pattern, _, options = argument.partition("?")
    selected = {}
    for option in options.split("&") if options else ():
        key, _, column = option.partition("=")
        if key not in ("image", "caption") or not column:
            raise ValueError(f"{argument}: {option!r} is neither image=COLUMN nor caption=COLUMN")
        selected[key] = column
    return pattern, selected


def _batches(path: str, kind: str, selected: dict[str, str], notes: list[str]) -> Iterator[pa.RecordBatch]:
    folder, table_notes = path.rpartition("/")[0].encode(), list[str]()
    try:
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(open_file(path))
            if name := compression(file.read(8)):
                raise ValueError(f"compressed with {name}")
            file.seek(0)
            if kind == "csv":  # every byte is one character
                file = stack.enter_context(io.TextIOWrapper(file, encoding="latin-1", newline=""))
            for names, images, captions in (_csv if kind == "csv" else _parquet)(file, selected, table_notes):
                paths = [
                    name if image is not None or not name or _is_absolute(name) else b"/".join((folder, name))
                    for name, image in zip(names, images, strict=True)
                ]
                columns = (paths, images, [each if isinstance(each, list) else [each] for each in captions])
                arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
                yield pa.record_batch(arrays, _SCHEMA)
    except (ValueError, csv.Error, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # an error of the file system; Arrow's errors about a damaged file are OSErrors without a number
        raise ValueError(f"{path}: {printable(' '.join(str(error).split()))[:300]}") from None
    notes += [f"{path}: {note}" for note in table_notes]


class _Lines(Iterator[str]):
    """Iterates over the lines of a table, which end with \\n, \\r\\n or \\r.

    Attributes:
      ended: whether `next` was called after the last line.
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
            reason = f"has {_MAX_LINE:,} characters or more" if len(line) == _MAX_LINE else "has control characters"
            raise ValueError(f"line {self._number} {reason}: not a table of text")
        return line.removeprefix("\xef\xbb\xbf") if self._number == 1 else line


_Columns = tuple[list[Any], list[Any], list[Any]]  # paths, images, captions


def _csv(text: IO[str], selected: dict[str, str], notes: list[str]) -> Iterator[_Columns]:
    """Yield the columns as bytes, so that a caption that is not UTF-8 makes its row bad, not the table."""
    lines = _Lines(text)
    if not (header := next(lines, "")):
        raise ValueError("an empty file")
    reader = csv.reader(itertools.chain([header], lines), delimiter="\t" if "\t" in header else ",")
    names = next(reader, [])
    image, caption = (names.index(name) for name in _columns(names, selected, notes))
    images, captions, blank, multiline = list[bytes](), list[bytes](), list[int](), list[int]()
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
            raise ValueError(f"line {start}: the quote that opens there is never closed")
        if len(row) < 2 and not "".join(row).strip():
            blank.append(start)
            continue
        if len(row) != len(names):
            raise ValueError(f"line {start}: {len(row)} columns; the header has {len(names)}")
        if reader.line_num > start:
            multiline.append(start)
        images.append(row[image].encode("latin-1"))
        captions.append(row[caption].encode("latin-1"))
        if len(images) == _CSV_ROWS:
            yield images, [None] * len(images), captions
            images, captions = [], []
    if images:
        yield images, [None] * len(images), captions
    if blank:
        notes.append(f"blank lines skipped: {len(blank):,}; first line {blank[0]}")
    if multiline:
        notes.append(
            "rows that continue on the next line (a caption with line breaks, or a quote that is closed rows later): "
            f"{len(multiline):,}; first line {multiline[0]}"
        )


def _parquet(file: IO[bytes], selected: dict[str, str], notes: list[str]) -> Iterator[_Columns]:
    table = parquet.ParquetFile(file)
    schema = table.schema_arrow
    image, caption = _columns(schema.names, selected, notes)
    kind, embedded = schema.field(image).type, False
    fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    struct = "bytes" in fields and _is_bytes(fields["bytes"]) and _is_text(fields.get("path", pa.string()))
    if not (struct or _is_text(kind) or (embedded := _is_bytes(kind))):
        raise ValueError(f"column {image!r} is {kind}: expected paths, bytes, or a struct of bytes and path")
    texts = schema.field(caption).type
    if not (_is_text(_item(texts)) or _is_bytes(_item(texts))):
        raise ValueError(f"column {caption!r} is {texts}: expected texts or lists of texts")
    for batch in table.iter_batches(_PARQUET_ROWS, columns=[image, caption]):
        values = batch.column(image)
        rows = values.to_pylist() if struct else values.cast(_TEXT).to_pylist()
        none = [None] * len(rows)
        if struct:
            paths = [row and row.get("path") and row["path"].encode() for row in rows]
            data = [row and (row["bytes"] or None) for row in rows]
        else:
            paths, data = (none, rows) if embedded else (rows, none)
        yield paths, data, batch.column(caption).cast(_TEXTS if _item(texts) != texts else _TEXT).to_pylist()


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _item(kind: pa.DataType) -> pa.DataType:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return kind.value_type if lists else kind


def _columns(names: Sequence[str], selected: dict[str, str], notes: list[str]) -> list[str]:
    """Return the names of the image column and of the caption column."""
    result = []
    for key, known in (("image", _IMAGE_COLUMNS), ("caption", _CAPTION_COLUMNS)):
        candidates = (selected[key],) if key in selected else known
        matches = [name for name in candidates if name in names]
        if not matches:
            columns = ", ".join(names)[:100]
            raise ValueError(f"no column {' or '.join(candidates)} among {columns}; select one with ?{key}=COLUMN")
        first, *others = matches
        if names.count(first) > 1:
            raise ValueError(f"{names.count(first)} columns have the name {first!r}")
        if others:
            notes.append(
                f"{key}s are read from column {first!r}, not {', '.join(others)}; ?{key}=COLUMN selects another"
            )
        result.append(first)
    return result


def _is_absolute(path: bytes) -> bool:
    return path.startswith(b"/") or b"://" in path
