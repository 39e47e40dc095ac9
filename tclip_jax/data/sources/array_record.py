"""ArrayRecord files of tf.train.Example, as TFDS and Grain users write them, at random access."""

from __future__ import annotations

import functools
import os
import pathlib
from typing import Any

from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from tclip_jax.data.sources.base import FAULTS, OPEN_CLIP_ORDER, BadSample, Record, decode_caption
from tclip_jax.data.sources.patterns import find_files, is_remote
from tclip_jax.data.sources.remote import retry, size_and_mtime
from tclip_jax.data.sources.shard_index import Scan, ShardIndex, open_index

_IMAGE_KEYS = ("image", "image/encoded", *OPEN_CLIP_ORDER)
_CAPTION_KEYS = ("caption", "captions", "text", "texts", "txt", "caption/text", "captions/text", "texts/text")
_OPEN_FILES = 256  # readers kept open; each holds the offsets of its chunks, a few kB


def open_files(pattern: str, split: str) -> ArrayRecord:
    """Open the files of a pattern; `split` is ignored.

    Raises:
      FileNotFoundError: no file matches.
      ValueError: the pattern is a URL, which ArrayRecord's reader cannot open.
    """
    if is_remote(pattern):
        raise ValueError(
            f"arrayrecord:{pattern}: ArrayRecord's reader opens only local paths; mount the bucket (gcsfuse)"
        )
    return ArrayRecord(open_index("arrayrecord", find_files(pattern), scan))


class ArrayRecord:
    """The records of some files: each an Example with an encoded image and its captions.

    The image is the feature `image`, `image/encoded`, `jpg`, `png`, `jpeg` or `webp`. The captions are the values of
    the feature `caption`, `captions`, `text`, `texts` or `txt`. The index stores only the number of records per file.
    For data that TFDS prepared, `tfds:<name>` also has the splits and the class names.
    """

    classnames: tuple[str, ...] = ()

    def __init__(self, index: ShardIndex) -> None:
        self._index, self.notes = index, index.notes

    @property
    def digest(self) -> str:
        """Digest of the contents of the files."""
        return self._index.digest

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Record:
        shard, row = self._index.locate(index)
        path = self._index.shards[shard]
        name = f"{path}/{row}"
        data = retry(lambda: _read(path, row, self._index.stamps[shard]), name)
        try:
            features = tf_example_pb2.Example.FromString(data).features.feature
        except Exception as error:  # protobuf's DecodeError, whose module differs between versions
            raise BadSample("corrupt_record", name, f"not a tf.train.Example ({error})") from None
        images, captions = (_first(features, keys) for keys in (_IMAGE_KEYS, _CAPTION_KEYS))
        if not images:
            reason = f"no bytes in any of the features {', '.join(_IMAGE_KEYS)}; the Example has "
            raise BadSample("no_image", name, reason + (", ".join(sorted(features)) or "no features"))
        if len(images) > 1:
            raise BadSample("corrupt_record", name, f"{len(images)} images in one Example")
        return Record(images[0], tuple(decode_caption(caption, name) for caption in captions), -1, name)


def _first(features: Any, keys: tuple[str, ...]) -> list[bytes]:
    return next((list(values) for key in keys if key in features and (values := features[key].bytes_list.value)), [])


def scan(path: str) -> Scan:
    """Read the number of records of a file from its footer.

    Raises:
      FileNotFoundError: the file does not exist.
    """
    size = pathlib.Path(path).stat().st_size
    if not size:
        return Scan(0, 1, FAULTS.index("empty_shard"))
    reader = _reader(path)
    records = reader.num_records()
    if not reader.ok():
        return Scan(size, 1, FAULTS.index("broken_shard"))
    return Scan(size, records) if records else Scan(size, 1, FAULTS.index("empty_shard"))


def _read(path: str, row: int, stamp: str) -> bytes:
    try:
        (data,) = _indexed_reader(path, stamp).read([row])
    except RuntimeError as error:
        raise BadSample("corrupt_record", f"{path}/{row}", f"ArrayRecord cannot read it ({error})") from None
    return data


@functools.lru_cache(maxsize=_OPEN_FILES)
def _indexed_reader(path: str, stamp: str) -> Any:
    if not stamp.startswith(size_and_mtime(os.stat(path))):
        raise BadSample("broken_shard", path, "the file was changed after it was indexed: restart")
    return _reader(path)


def _reader(path: str) -> Any:
    return array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
