"""The interface of a data source: records at random access, errors for bad samples, and a digest of the content."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, Literal, Protocol, get_args

import numpy as np

from tclip_jax.data.files import split_lines

Fault = Literal[
    "corrupt_image",
    "too_many_pixels",
    "no_image",
    "no_caption",
    "invalid_utf8",
    "duplicate_key",
    "unsafe_name",
    "too_large",
    "corrupt_record",
    "broken_shard",
    "empty_shard",
    "unreadable",
]
# The kinds of fault. A batch has the index in this list.
FAULTS = ("none", *get_args(Fault))
# Limit of an image file, and of an image and its caption in a tar. A path in a table may name an endless file.
MAX_SAMPLE_BYTES = 1 << 28
# If a sample has several images, open_clip's training uses the first of these suffixes.
OPEN_CLIP_ORDER = ("jpg", "png", "jpeg", "webp")


class BadSample(ValueError):
    """A sample that cannot be used. It keeps its position in the source and is masked.

    Attributes:
      kind: one of FAULTS, except "none".
      name: path or key of the sample.
      reason: one line.
    """

    def __init__(self, kind: Fault, name: str, reason: str) -> None:
        super().__init__(kind, name, reason)
        self.kind, self.name, self.reason = kind, name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One image with its captions or its label.

    Attributes:
      image: encoded bytes (PNG, JPEG, WebP, …), or pixels (H, W, 3) uint8.
      captions: all captions of the image; empty for labelled data.
      label: index into the source's `classnames`; for images of several classes a 0/1 vector (classes,) int32; -1 for
        no label.
      name: path or key, for logs.
    """

    image: bytes | np.ndarray
    captions: tuple[str, ...]
    label: int | np.ndarray
    name: str


class Source(Protocol):
    """Random access to `len(source)` records.

    A source can be read from several threads and can be pickled for worker processes. `source[index]` raises
    `BadSample` for a sample that cannot be used. Optional attributes:

      digest: a string that changes with the records, does not depend on their path, and costs less than reading all
        records.
      notes: lines about skipped files and likely mistakes in the data.
      parts: of a mixture: the weight and the length of each source.
      templates: the data's own caption templates, or None.
    """

    @property
    def classnames(self) -> tuple[str, ...]:
        """Names of the classes, indexed by label; empty for captioned data."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def digest(source: Source) -> str:
    """Return the number of records and a digest that changes with any image, caption and label.

    The digest is equal on every host and for a copy at another path. docs/data.md describes how it is computed and what
    it costs.
    """
    return f"{len(source)}:{source.digest if hasattr(source, 'digest') else _records_digest(source)}"


def described(source: Source) -> dict[str, Any]:
    """Return `digest` as {"samples", "content"}; for a mixture {"samples", "parts"}, with one entry per source."""
    sources = getattr(source, "sources", ())
    if sources:
        weights = [weight for weight, _ in source.parts]  # type: ignore[attr-defined]
        return {
            "samples": len(source),
            "parts": {
                str(i): {"weight": weight, **described(part)}
                for i, (weight, part) in enumerate(zip(weights, sources, strict=True))
            },
        }
    samples, _, content = digest(source).partition(":")
    return {"samples": int(samples), "content": content}


def _records_digest(source: Source) -> str:
    """Return a digest of all records, for a source without `digest`."""
    total = hashlib.blake2b("\n".join(source.classnames).encode(), digest_size=16)
    for index in range(len(source)):
        try:
            record = source[index]
        except (BadSample, OSError) as error:
            total.update(f"bad {error.kind if isinstance(error, BadSample) else 'unreadable'}\n".encode())
            continue
        image = record.image if isinstance(record.image, bytes) else record.image.tobytes()
        header = (len(image), np.shape(record.image), np.asarray(record.label).tolist(), record.captions)
        total.update(f"{header!r}\n".encode("utf-8", "surrogateescape"))
        total.update(image)
    return total.hexdigest()


def notes(source: Source) -> list[str]:
    """Return the source's notes for the log: skipped files, and likely mistakes in the data."""
    return list(getattr(source, "notes", ()))


def decode_caption(data: bytes, name: str) -> str:
    """Decode a caption, which may have several lines, from UTF-8.

    Args:
      data: the bytes.
      name: name of the sample, for the error.

    Raises:
      BadSample: the caption is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample("invalid_utf8", name, f"the caption is not UTF-8 at byte {error.start}") from None


def decode_captions(data: bytes, name: str) -> tuple[str, ...]:
    """Decode a file with one caption per line and drop blank lines. Raises as `decode_caption`."""
    return tuple(line.strip() for line in split_lines(decode_caption(data, name)) if line.strip())
