"""Tars as tests write them."""

from __future__ import annotations

import io
import pathlib
import tarfile
from collections.abc import Iterable


def write_tar(path: pathlib.Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Writes (name, bytes) in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
