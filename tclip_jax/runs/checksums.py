"""Checksums of a checkpoint's files: written into it before it counts as one, compared before it is read.

`python -m tclip_jax.runs.checksums FOLDER…` adds them to checkpoints that are known to be whole.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from tclip_jax.artifacts.files import sha256
from tclip_jax.storage import is_local, sync_tree, write_atomic

CHECKSUMS, COMMITTED = "checksums.json", "commit_success.txt"
_VERSION = 1
# Orbax writes these into a finished checkpoint once more, when it commits it.
_COMMITTED_LATER = ("_CHECKPOINT_METADATA", COMMITTED)


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken or of another model; one line with the folder and what was expected."""


def write_checksums(folder: epath.Path) -> None:
    """Waits until the files are on disk, then writes the length and the SHA-256 of each into `folder`."""
    if is_local(folder):
        sync_tree(folder)
    files = {name: path for name, path in files_below(folder).items() if name not in (*_COMMITTED_LATER, CHECKSUMS)}
    with ThreadPoolExecutor() as threads:
        entries = dict(zip(files, threads.map(_entry, files.values()), strict=True))
    write_atomic(folder / CHECKSUMS, json.dumps({"version": _VERSION, "files": entries}, indent=2))


def damage(folder: epath.Path, part: str = "", *, contents: bool = True) -> str | None:
    """Why a checkpoint, or its sub-folder `part`, is not whole: the first file that is not what was written; or None.

    Files beside the sub-folders, and those whose names begin with a dot, are nobody's.

    Args:
      contents: compare the bytes of each file; otherwise only its name and length.

    Raises:
      CheckpointError: checksums that a newer version wrote.
    """
    if not (folder / COMMITTED).exists():
        return f"{folder} has no {COMMITTED}: it was not written, or not copied, to its end"
    if not (folder / CHECKSUMS).exists():
        return (
            f"{folder} has no {CHECKSUMS}: it was not copied to its end; or an older version wrote it, and "
            f"`python -m tclip_jax.runs.checksums {folder}` adds them if it is whole"
        )
    entries = _read_entries(folder / CHECKSUMS)
    if entries is None:
        return f"{folder / CHECKSUMS} is damaged"
    wanted = {name: entry for name, entry in entries.items() if name.startswith(part)}
    found = {name: path for name, path in files_below(folder).items() if name.startswith(part)}
    for name in found:
        if "/" in name and name not in wanted and not any(piece.startswith(".") for piece in name.split("/")):
            return f"{folder / CHECKSUMS} does not name {name}, which is there"
    with ThreadPoolExecutor() as threads:
        said = threads.map(lambda name: _difference(folder / name, found.get(name), wanted[name], contents), wanted)
        return next((each for each in said if each), None)


def _read_entries(path: epath.Path) -> dict[str, dict[str, Any]] | None:
    """By file name; None where they are not what was written."""
    try:
        stored = json.loads(path.read_text())
        if isinstance(stored, dict) and "version" in stored:
            if stored["version"] != _VERSION:
                raise CheckpointError(
                    f"{path} is of version {stored['version']!r}, and this tclip_jax reads {_VERSION}: a checkpoint of "
                    "another version needs that version"
                )
            stored = stored["files"]  # without a version: as the first versions wrote it
        entries = {name: {"bytes": int(entry["bytes"]), "sha256": entry["sha256"]} for name, entry in stored.items()}
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return entries or None


def _difference(path: epath.Path, there: epath.Path | None, entry: dict[str, Any], contents: bool) -> str | None:
    try:
        if there is None:
            return f"{path} is missing"
        if (length := there.stat().length) != entry["bytes"]:
            return f"{path} has {length} bytes instead of {entry['bytes']}"
        right = not contents or sha256(there) == entry["sha256"]
    except OSError as error:
        return f"{path} cannot be read: {error}"
    return None if right else f"{path} is damaged: its bytes are not those that were written"


def _entry(path: epath.Path) -> dict[str, Any]:
    return {"bytes": path.stat().length, "sha256": sha256(path)}


def files_below(folder: epath.Path, below: str = "") -> dict[str, epath.Path]:
    """All files in a folder and its sub-folders, by their path from it."""
    found: dict[str, epath.Path] = {}
    for path in sorted(folder.iterdir()):
        name = f"{below}{path.name}"
        found |= files_below(path, f"{name}/") if path.is_dir() else {name: path}
    return found


if __name__ == "__main__":
    for each in map(epath.Path, sys.argv[1:]):
        write_checksums(each)
        if not (each / COMMITTED).exists():
            write_atomic(each / COMMITTED, "accepted by hand\n")
        print(f"{each}: its files are taken as they are")
