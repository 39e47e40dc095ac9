"""Tables of image paths and captions: CSV, TSV and Parquet files."""

from __future__ import annotations

import csv as python_csv
import functools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
from pyarrow import csv, parquet

from tclip_jax import keys
from tclip_jax.data.sources.base import MAX_SAMPLE_BYTES, BadSample, Record, cache_folder
from tclip_jax.data.sources.content import combined, contents, stamps
from tclip_jax.data.sources.patterns import find_files
from tclip_jax.data.sources.remote import open_file, read_file
from tclip_jax.storage import atomic_file

# open_clip's defaults are filepath and title.
_IMAGE_COLUMNS = ("filepath", "image", "path", "file", "file_name", "filename", "image_path", "url")
_CAPTION_COLUMNS = ("title", "caption", "text", "captions", "texts")

_MAX_HEADER = 1 << 16
_SCHEMA = pa.schema([("image", pa.large_binary()), ("captions", pa.large_list(pa.large_binary()))])


def open_csv(argument: str, split: str) -> Table:
    """The rows of CSV or TSV files; they have no splits."""
    return Table(_cached(argument, "csv"))


def open_parquet(argument: str, split: str) -> Table:
    """The rows of Parquet files; they have no splits."""
    return Table(_cached(argument, "parquet"))


class Table:
    """A row of a table is a sample: the path or URL of an image, and its caption or, in Parquet, list of captions.

    The columns are the first of `filepath`, `image`, `path`, `file`, `file_name`, `filename`, `image_path`, `url` and
    of `title`, `caption`, `text`, `captions`, `texts` that there are, or what `?image=…&caption=…` after the path
    names. A path that is not absolute is read from the folder of its table. Both columns are copied into the cache
    folder once, and mapped from there: a table takes no memory, in no worker.

    Raises:
      FileNotFoundError: no such table.
      ValueError: a table without these columns, with other things in them than text, or that cannot be parsed; one
        line with its row.
    """

    classnames: tuple[str, ...] = ()

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path

    def __len__(self) -> int:
        return self._rows.num_rows

    def __reduce__(self) -> tuple[Any, ...]:
        return Table, (self._path,)

    def __getitem__(self, index: int) -> Record:
        path, captions = (self._rows[i][index].as_py() for i in range(2))
        name = (path or b"").decode("utf-8", "replace") or f"row {index}"
        if not path:
            raise BadSample("no_image", name, "its row names none")
        texts = tuple(_decode(text, name) for text in captions or () if text)
        try:
            return Record(read_file(_decode(path, name)), texts, -1, name)
        except BadSample as error:
            missing = isinstance(error.__cause__, (FileNotFoundError, IsADirectoryError, NotADirectoryError))
            raise BadSample("no_image", name, "no such file") if missing else error from None

    @functools.cached_property
    def digest(self) -> str:
        """Of captions and of the contents of images, in the order of the rows; of no path."""
        paths = (os.fsdecode(image or b"") for batch in self._rows.to_batches() for image in batch[0].to_pylist())
        images = contents(paths, total=len(self), max_bytes=MAX_SAMPLE_BYTES)
        captions = (row or [] for batch in self._rows.to_batches() for row in batch[1].to_pylist())
        return combined(
            part for image, row in zip(images, captions, strict=True) for part in (image, *map(_as_text, row), "")
        )

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
    """The Arrow file of both columns of the tables, made now if it is not there."""
    pattern, chosen = _options(argument)
    tables = find_files(pattern)
    key = keys.digest({"kind": kind, "columns": chosen, "tables": tables, "stamps": stamps(tables)})
    target = cache_folder() / "tables" / f"{key}.arrow"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            for path in tables:
                for batch in _batches(path, kind, chosen):
                    writer.write_batch(batch)
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


def _batches(path: str, kind: str, chosen: dict[str, str]) -> Iterator[pa.RecordBatch]:
    folder = path.rpartition("/")[0].encode()
    try:
        with open_file(path) as file:
            for images, captions in (_csv if kind == "csv" else _parquet)(file, path, chosen):
                whole = [image and (image if _is_absolute(image) else b"/".join((folder, image))) for image in images]
                lists = [each if isinstance(each, list) else [each] for each in captions]
                yield pa.record_batch([pa.array(whole, _SCHEMA[0].type), pa.array(lists, _SCHEMA[1].type)], _SCHEMA)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from None


def _csv(file: IO[bytes], path: str, chosen: dict[str, str]) -> Iterator[tuple[list[Any], list[Any]]]:
    """Columns as bytes: a caption that is not UTF-8 costs its row, not the table."""
    header = file.readline(_MAX_HEADER).decode("utf-8-sig", "replace")
    delimiter = "\t" if "\t" in header else ","
    columns = _columns(next(python_csv.reader([header], delimiter=delimiter), []), path, chosen)
    file.seek(0)
    reader = csv.open_csv(
        file,
        parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=csv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pa.binary())),
    )
    for batch in reader:
        yield batch[0].to_pylist(), batch[1].to_pylist()


def _parquet(file: IO[bytes], path: str, chosen: dict[str, str]) -> Iterator[tuple[list[Any], list[Any]]]:
    table = parquet.ParquetFile(file)
    columns = _columns(table.schema_arrow.names, path, chosen)
    for batch in table.iter_batches(columns=columns):
        yield tuple(_as_bytes(batch.column(name)).to_pylist() for name in columns)


def _as_bytes(array: pa.Array) -> pa.Array:
    lists = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
    return array.cast(_SCHEMA[1].type if lists else _SCHEMA[0].type)


def _columns(names: Sequence[str], path: str, chosen: dict[str, str]) -> list[str]:
    found = []
    for key, known in (("image", _IMAGE_COLUMNS), ("caption", _CAPTION_COLUMNS)):
        wanted = (chosen[key],) if key in chosen else known
        column = next((name for name in wanted if name in names), None)
        if column is None:
            raise ValueError(
                f"{path}: no column {' or '.join(wanted)} among {', '.join(names)[:200]}; name it with ?{key}=COLUMN"
            )
        found.append(column)
    return found


def _is_absolute(path: bytes) -> bool:
    return path.startswith(b"/") or b"://" in path
