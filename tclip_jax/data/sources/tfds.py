"""Data sets that TensorFlow Datasets has prepared as ArrayRecord, read at random access without TensorFlow."""

from __future__ import annotations

import os
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from tclip_jax.data.sources.base import BadSample, Record

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
        where = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
        there = f" --data_dir={data_dir}" if data_dir else ""
        remedy = f"prepare it with `tfds build {name} --file_format=array_record{there}`"
        try:
            builder = read_only_builder.builder_from_files(name, data_dir=data_dir or None)
        except tfds.core.DatasetNotFoundError:
            raise FileNotFoundError(f"tfds:{name}: not prepared in {where}; {remedy}") from None
        except ValueError as error:  # a malformed name, or the same data set in several places; TFDS explains at length
            raise ValueError(f"tfds:{name}: {str(error).partition(chr(10))[0]}") from None

        features = dict(builder.info.features.items())
        label = features.get("label")
        self.classnames = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()
        self._captions = next((key for key in _CAPTION_FEATURES if key in features and not self.classnames), None)
        if "image" not in features or not (self.classnames or self._captions):
            wanted = f"image and a ClassLabel label, or image and one of {', '.join(_CAPTION_FEATURES)}"
            raise ValueError(f"tfds:{name}: has the features {', '.join(sorted(features))}; needs {wanted}")
        self._name = f"{name}/{split}"
        encoded = {k: tfds.decode.SkipDecoding() for k, f in features.items() if isinstance(f, tfds.features.Image)}
        try:
            self._records = builder.as_data_source(split=split, decoders=encoded)
        except NotImplementedError:
            raise ValueError(
                f"tfds:{name}: prepared as {builder.info.file_format.value}, which has no random access; {remedy}"
            ) from None
        except ValueError:
            raise ValueError(f"tfds:{name}: no split {split!r}; it has {', '.join(builder.info.splits)}") from None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        name = f"{self._name}/{index}"
        try:
            record = self._records[index]
        except RuntimeError as error:
            raise BadSample("corrupt_record", name, f"ArrayRecord cannot read it ({error})") from None
        captions = _texts(record[self._captions]) if self._captions else ()
        label = int(record["label"]) if self.classnames else -1
        return Record(record["image"], captions, label, name)


def _texts(value: Any) -> tuple[str, ...]:
    """Every text in a decoded feature, which is bytes, a sequence of them, or a dict that has them as `text`."""
    if isinstance(value, dict):
        return _texts(value["text"])
    if isinstance(value, bytes):
        return (value.decode("utf-8", errors="replace"),)
    return tuple(text for item in value for text in _texts(item))
