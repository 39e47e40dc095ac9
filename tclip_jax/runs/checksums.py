"""Checksums of a checkpoint's files: written into it before it counts as one, compared before it is read."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from tclip_jax.artifacts.files import sha256
from tclip_jax.storage import is_local, sync_tree, write_atomic

_FILE = "checksums.json"
# Orbax writes these into a finished checkpoint once more, when it commits it.
_COMMITTED_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


def write_checksums(folder: epath.Path) -> None:
    """Waits until the files are on disk, then writes the length and the SHA-256 of each into `folder`."""
    if is_local(folder):
        sync_tree(folder)
    files = [path for path in _files(folder) if str(path.relative_to(folder)) not in _COMMITTED_LATER]
    with ThreadPoolExecutor() as threads:
        entries = dict(zip((str(path.relative_to(folder)) for path in files), threads.map(_entry, files), strict=True))
    write_atomic(folder / _FILE, json.dumps(entries, indent=2))


def damage(folder: epath.Path, part: str = "") -> str | None:
    """What is wrong with the first file of `folder`, or of its sub-folder `part`, that is not what it was; or None.

    A checkpoint without checksums, as older versions wrote, is not looked into.
    """
    path = folder / _FILE
    if not path.exists():
        return None
    try:
        entries: dict[str, Any] = json.loads(path.read_text())
        names = [name for name, _ in entries.items() if name.startswith(part)]
        with ThreadPoolExecutor() as threads:
            found = threads.map(lambda name: _difference(folder / name, entries[name]), names)
            return next((each for each in found if each), None)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path} is damaged"


def _difference(path: epath.Path, entry: dict[str, Any]) -> str | None:
    if not path.exists():
        return f"{path} is missing"
    if (length := path.stat().length) != entry["bytes"]:
        return f"{path} has {length} bytes instead of {entry['bytes']}"
    return None if sha256(path) == entry["sha256"] else f"{path} is damaged: its bytes are not those that were written"


def _entry(path: epath.Path) -> dict[str, Any]:
    return {"bytes": path.stat().length, "sha256": sha256(path)}


def _files(folder: epath.Path) -> list[epath.Path]:
    found: list[epath.Path] = []
    for path in sorted(folder.iterdir()):
        found += _files(path) if path.is_dir() else [path]
    return found
