"""What every kind of data source yields: records at random access."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np


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
    """Random access to `len(source)` records; safe to read from several threads and to pickle for worker processes."""

    @property
    def classnames(self) -> tuple[str, ...]:
        """Names of the classes in the order of the labels; empty for captioned data."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...
