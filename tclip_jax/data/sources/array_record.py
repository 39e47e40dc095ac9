"""ArrayRecord files of tf.train.Example, as TFDS and Grain users write them, at random access."""

from __future__ import annotations

import functools
import os
import pathlib
from typing import Any

from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from tclip_jax.data.sources.base import FAULTS, BadSample, Record, decode_caption
from tclip_jax.data.sources.patterns import find_files, is_remote
from tclip_jax.data.sources.remote import change, retry
from tclip_jax.data.sources.shard_index import Scan, ShardIndex, open_index
from tclip_jax.data.sources.tar import OPEN_CLIP_ORDER

_IMAGE_KEYS = ("image", "image/encoded", *OPEN_CLIP_ORDER)
_CAPTION_KEYS = ("caption", "captions", "text", "texts", "txt", "caption/text", "captions/text", "texts/text")
_OPEN_FILES = 256  # each holds its chunks' offsets: a few kB


def open_files(pattern: str, split: str) -> ArrayRecord:
    """The records of the files that a pattern names; they have no splits.

    Raises:
      FileNotFoundError: no file matches.
      ValueError: a URL, which ArrayRecord's reader cannot open.
    """
    if is_remote(pattern):
        raise ValueError(f"arrayrecord:{pattern}: its reader opens local paths alone; mount the bucket (gcsfuse)")
    return ArrayRecord(open_index("arrayrecord", find_files(pattern), scan))


class ArrayRecord:
    """Every record of some files: an Example with an encoded image and its captions, each a value of its own.

    The image is the feature `image`, `image/encoded`, `jpg`, `png`, `jpeg` or `webp`; the captions are `caption`,
    `captions`, `text`, `texts` or `txt`, of which there may be several. Of each file only its number of records
    is kept. For data that TFDS has prepared `tfds:<name>` says more: which split, and the names of the classes.
    """

    classnames: tuple[str, ...] = ()

    def __init__(self, index: ShardIndex) -> None:
        self._index, self.notes = index, index.notes

    @property
    def digest(self) -> str:
        """Of the contents of the files."""
        return self._index.digest

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Record:
        shard, place = self._index.locate(index)
        path = self._index.shards[shard]
        name = f"{path}/{place}"
        data = retry(lambda: _read(path, place, self._index.stamps[shard]), name)
        try:
            features = tf_example_pb2.Example.FromString(data).features.feature
        except Exception as error:  # protobuf's own DecodeError, whose place differs between its versions
            raise BadSample("corrupt_record", name, f"not a tf.train.Example ({error})") from None
        images, captions = (_first(features, keys) for keys in (_IMAGE_KEYS, _CAPTION_KEYS))
        if not images:
            names = ", ".join(sorted(features)) or "nothing"
            raise BadSample("no_image", name, f"no bytes called {' or '.join(_IMAGE_KEYS)} in an Example with {names}")
        if len(images) > 1:
            raise BadSample("corrupt_record", name, f"{len(images)} images in one Example")
        return Record(images[0], tuple(decode_caption(each, name) for each in captions), -1, name)


def _first(features: Any, keys: tuple[str, ...]) -> list[bytes]:
    return next((list(values) for key in keys if key in features and (values := features[key].bytes_list.value)), [])


def scan(path: str) -> Scan:
    """The number of records of one file, from its footer.

    Raises:
      FileNotFoundError: there is no such file.
    """
    size = pathlib.Path(path).stat().st_size
    if not size:
        return Scan(0, 1, FAULTS.index("empty_shard"))
    reader = _reader(path)
    records = reader.num_records()
    if not reader.ok():
        return Scan(size, 1, FAULTS.index("broken_shard"))
    return Scan(size, records) if records else Scan(size, 1, FAULTS.index("empty_shard"))


def _read(path: str, place: int, stamp: str) -> bytes:
    try:
        (data,) = _indexed_reader(path, stamp).read([place])
    except RuntimeError as error:
        raise BadSample("corrupt_record", f"{path}/{place}", f"ArrayRecord cannot read it ({error})") from None
    return data


@functools.lru_cache(maxsize=_OPEN_FILES)
def _indexed_reader(path: str, stamp: str) -> Any:
    if not stamp.startswith(change(os.stat(path))):
        raise BadSample("broken_shard", path, "the file was changed after it was indexed: start again")
    return _reader(path)


def _reader(path: str) -> Any:
    return array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
