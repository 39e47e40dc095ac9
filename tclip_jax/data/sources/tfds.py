"""Data sets that TensorFlow Datasets prepared as ArrayRecord, at random access and without TensorFlow."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from tclip_jax.data.sources.base import BadSample, Record, decode_caption
from tclip_jax.data.sources.content import combined, contents

_CAPTION_FEATURES = ("caption", "captions", "text", "texts")


class Tfds:
    """A prepared data set, `<name>[/config][:version][@<data_dir>]`; `split` may be a slice such as `train[:10%]`.

    The data is labelled if it has the features `image` and `label` (a ClassLabel). It is captioned if it has `image`
    and a feature `caption`, `captions`, `text` or `texts`: a Text, or a Sequence of Text or of dicts with a `text`.
    Images stay encoded. Only the files are read; the code that prepared them is not needed.
    """

    classnames: tuple[str, ...]

    def __init__(self, argument: str, split: str) -> None:
        name, _, data_dir = argument.partition("@")
        builder, self._records = open_prepared(name, split, data_dir)
        features = dict(builder.info.features.items())
        label = features.get("label")
        self.classnames = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()
        self._captions = next((key for key in _CAPTION_FEATURES if key in features and not self.classnames), None)
        if "image" not in features or not (self.classnames or self._captions):
            needed = f"image and a ClassLabel label, or image and one of {', '.join(_CAPTION_FEATURES)}"
            raise ValueError(f"tfds:{name}: has the features {', '.join(sorted(features))}; needs {needed}")
        self._name, self._info, self._split = f"{name}/{split}", builder.info, split

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the contents of the record files, the records that are read of each, and the class names."""
        return combined([*self.classnames, self._captions or "", *record_contents(self._info, self._split)])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        name = f"{self._name}/{index}"
        record = read_record(self._records, index, name)
        captions = tuple(_texts(record[self._captions], name)) if self._captions else ()
        label = int(record["label"]) if self.classnames else -1
        return Record(record["image"], captions, label, name)


def open_prepared(name: str, split: str, data_dir: str) -> tuple[Any, Any]:
    """Open a prepared data set.

    Args:
      name: `<name>[/config][:version]`.
      split: name or slice of a split.
      data_dir: folder of prepared data sets; "" for the default of TFDS.

    Returns:
      The builder, and the records of the split; images stay encoded.

    Raises:
      FileNotFoundError: the data set is not prepared in `data_dir`, or a file is missing.
      ValueError: the data set has another file format, is damaged, or has no such split. The message is one line.
    """
    folder = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    option = f" --data_dir={data_dir}" if data_dir else ""
    remedy = f"prepare it with `tfds build {name} --file_format=array_record{option}`"
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError:
        raise FileNotFoundError(f"tfds:{name}: not prepared in {folder}; {remedy}") from None
    # TFDS raises its own types, with long messages: for an invalid name, a data set in several folders, a missing or
    # damaged dataset_info.json.
    except Exception as error:
        raise ValueError(f"tfds:{name}: {str(error).partition(chr(10))[0]}") from None
    features = builder.info.features.items()
    encoded = {k: tfds.decode.SkipDecoding() for k, feature in features if isinstance(feature, tfds.features.Image)}
    try:
        records = builder.as_data_source(split=split, decoders=encoded)
    except NotImplementedError:
        raise ValueError(
            f"tfds:{name}: prepared as {builder.info.file_format.value}, which has no random access; {remedy}"
        ) from None
    except ValueError:
        raise ValueError(f"tfds:{name}: no split {split!r}; it has {', '.join(builder.info.splits)}") from None
    names = {path.name for path in builder.data_path.iterdir()}
    if missing := sorted(set(builder.info.splits[split].filenames) - names):
        count = f"{len(missing)} of its files are" if len(missing) > 1 else "a file is"
        raise FileNotFoundError(f"tfds:{name}: {builder.data_path}/{missing[0]}: no such file: {count} missing")
    return builder, records


def read_record(records: Any, index: int, name: str) -> dict[str, Any]:
    """Read one of the records that `open_prepared` returns.

    Args:
      records: the records.
      index: index of the record.
      name: name of the sample, for the error.

    Raises:
      BadSample: the record cannot be read.
    """
    try:
        record = records[index]
        if any(value is None for value in record.values()):  # the file ends before this record
            raise ValueError("no data: its file is truncated")
    except (RuntimeError, ValueError) as error:
        raise BadSample("corrupt_record", name, f"ArrayRecord cannot read it ({error})") from None
    return record


def record_contents(info: tfds.core.DatasetInfo, split: str) -> list[str]:
    """Return the range of records that a split reads of each file, and the digests of the files."""
    parts = info.splits[split].file_instructions
    spans = [f"{part.skip}+{part.take} of {part.examples_in_shard}" for part in parts]
    return [*spans, *contents([os.fspath(part.filename) for part in parts], total=len(parts))]


def _texts(value: Any, name: str) -> Iterator[str]:
    """Yield the texts of a decoded feature: bytes, a sequence of bytes, or dicts with bytes as `text`."""
    if isinstance(value, bytes):
        yield decode_caption(value, name)
        return
    for item in [value["text"]] if isinstance(value, dict) else value:
        yield from _texts(item, name)
