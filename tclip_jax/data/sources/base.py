"""What every kind of data source yields: records at random access, or the reason why there is none."""

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
# What can be wrong with a sample: the code in a batch is the place in this list.
FAULTS = ("none", *get_args(Fault))
# An image, or with its caption what they span of a tar: strangers name the files, and one may have no end.
MAX_SAMPLE_BYTES = 1 << 28


class BadSample(ValueError):
    """A sample that cannot be used. It keeps its place in the order of the source and counts with weight 0.

    Attributes:
      kind: one of FAULTS but "none".
      name: of the sample: its path or key.
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
      image: encoded bytes (PNG, JPEG, WebP), or pixels (H, W, 3) uint8.
      captions: every caption of the image; empty for labelled data.
      label: index into the source's `classnames`, or for images of several classes a 0/1 vector over them (C,) int32;
        -1 where there is none.
      name: path or key, for logs.
    """

    image: bytes | np.ndarray
    captions: tuple[str, ...]
    label: int | np.ndarray
    name: str


class Source(Protocol):
    """Random access to `len(source)` records; safe to read from several threads and to pickle for worker processes.

    `source[index]` raises `BadSample` where there is no record to give. A source may have a `digest`, which differs
    where its records do and is the same wherever the data lies, and is cheaper than reading all of them; `notes`, lines
    that say what it passes over; `parts`, the weight and the length of each of the sources that it is a mixture of; and
    `templates`, the captions of a class that its data states, None where it states none.
    """

    @property
    def classnames(self) -> tuple[str, ...]:
        """Names of the classes in the order of the labels; empty for captioned data."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def digest(source: Source) -> str:
    """What the data is: its number of records, and a digest that changes with any image, caption and label.

    Equal on every host and for a copy in another place. docs/data.md says how it is told and what it costs.
    """
    return f"{len(source)}:{source.digest if hasattr(source, 'digest') else _records_digest(source)}"


def described(source: Source) -> dict[str, Any]:
    """`digest` in parts: {"samples", "content"}, and of a mixture {"parts"} of all its sources, numbered."""
    parts = getattr(source, "sources", ())
    if parts:
        weights = [weight for weight, _ in source.parts]  # type: ignore[attr-defined]
        return {
            "samples": len(source),
            "parts": {
                str(i): {"weight": w, **described(each)} for i, (w, each) in enumerate(zip(weights, parts, strict=True))
            },
        }
    samples, _, content = digest(source).partition(":")
    return {"samples": int(samples), "content": content}


def _records_digest(source: Source) -> str:
    """Of records that are read one by one."""
    found = hashlib.blake2b("\n".join(source.classnames).encode(), digest_size=16)
    for index in range(len(source)):
        try:
            record = source[index]
        except (BadSample, OSError) as error:
            found.update(f"bad {error.kind if isinstance(error, BadSample) else 'unreadable'}\n".encode())
            continue
        image = record.image if isinstance(record.image, bytes) else record.image.tobytes()
        about = (len(image), np.shape(record.image), np.asarray(record.label).tolist(), record.captions)
        found.update(f"{about!r}\n".encode("utf-8", "surrogateescape"))
        found.update(image)
    return found.hexdigest()


def notes(source: Source) -> list[str]:
    """What a source passes over or takes for granted: lines for the log, the first time that it is opened."""
    return list(getattr(source, "notes", ()))


def decode_caption(data: bytes, name: str) -> str:
    """A caption, of one line or more.

    Raises:
      BadSample: it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample("invalid_utf8", name, f"the caption is not UTF-8 at byte {error.start}") from None


def decode_captions(data: bytes, name: str) -> tuple[str, ...]:
    """The lines of a caption file that are not blank; raises as `decode_caption` does."""
    return tuple(line.strip() for line in split_lines(decode_caption(data, name)) if line.strip())
