"""Data sets that TensorFlow Datasets has prepared as ArrayRecord, read at random access without TensorFlow."""

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

    Labelled if it has the features `image` and `label` (a ClassLabel); captioned if it has `image` and a text feature
    called `caption`, `captions`, `text` or `texts` (a Text, a Sequence of Text, or of dicts with a `text`). Images
    stay encoded. The data is found by its files alone, so the code that prepared it is not needed.
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
            wanted = f"image and a ClassLabel label, or image and one of {', '.join(_CAPTION_FEATURES)}"
            raise ValueError(f"tfds:{name}: has the features {', '.join(sorted(features))}; needs {wanted}")
        self._name, self._info, self._split = f"{name}/{split}", builder.info, split

    @functools.cached_property
    def digest(self) -> str:
        """Of the contents of the record files, which records of each are read, and the names of the classes."""
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
    """The builder of a prepared data set and the records of a split, whose images stay encoded.

    Raises:
      FileNotFoundError: it is not prepared in `data_dir`, or "" for the usual place; or a file is not there.
      ValueError: it is prepared otherwise or damaged, or has no such split; one line.
    """
    where = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    there = f" --data_dir={data_dir}" if data_dir else ""
    remedy = f"prepare it with `tfds build {name} --file_format=array_record{there}`"
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError:
        raise FileNotFoundError(f"tfds:{name}: not prepared in {where}; {remedy}") from None
    # A malformed name, the same data set in several places, a copy without or with a half dataset_info.json: TFDS
    # raises its own kinds of errors, and explains at length.
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
    """One of the records that `open_prepared` gives.

    Raises:
      BadSample: it cannot be read.
    """
    try:
        record = records[index]
        if any(value is None for value in record.values()):  # what comes of a file that ends within its records
            raise ValueError("nothing is there: its file was cut short")
    except (RuntimeError, ValueError) as error:
        raise BadSample("corrupt_record", name, f"ArrayRecord cannot read it ({error})") from None
    return record


def record_contents(info: tfds.core.DatasetInfo, split: str) -> list[str]:
    """Which records a split reads of each of its files, and the contents of these."""
    parts = info.splits[split].file_instructions
    spans = [f"{part.skip}+{part.take} of {part.examples_in_shard}" for part in parts]
    return [*spans, *contents([os.fspath(part.filename) for part in parts], total=len(parts))]


def _texts(value: Any, name: str) -> Iterator[str]:
    """Every text in a decoded feature, which is bytes, a sequence of them, or a dict that has them as `text`."""
    if isinstance(value, bytes):
        yield decode_caption(value, name)
        return
    for item in [value["text"]] if isinstance(value, dict) else value:
        yield from _texts(item, name)
