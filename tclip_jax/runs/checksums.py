"""Checksums of a checkpoint's files, written when the checkpoint is committed and compared before it is read.

Hand-written, because Orbax only checks that a checkpoint was committed, not that its files are complete and unchanged.
`python -m tclip_jax.runs.checksums FOLDER…` adds checksums to checkpoints that are known to be whole.
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
# Orbax writes these files when it commits a checkpoint, after the checksums.
_COMMITTED_LATER = ("_CHECKPOINT_METADATA", COMMITTED)


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another model; one line with its folder."""


def write_checksums(folder: epath.Path) -> None:
    """Flush the files of a checkpoint to disk, then write their lengths and SHA-256 into its checksums.json."""
    if is_local(folder):
        sync_tree(folder)
    files = {name: path for name, path in files_below(folder).items() if name not in (*_COMMITTED_LATER, CHECKSUMS)}
    with ThreadPoolExecutor() as threads:
        entries = dict(zip(files, threads.map(_entry, files.values()), strict=True))
    write_atomic(folder / CHECKSUMS, json.dumps({"version": _VERSION, "files": entries}, indent=2))


def damage(folder: epath.Path, part: str = "", *, contents: bool = True) -> str | None:
    """Return the first difference between a checkpoint and its checksums; None if it is whole.

    Files directly in `folder`, and files with a name that starts with a dot, may differ.

    Args:
      folder: the checkpoint of one step.
      part: check only this sub-folder, written with a final "/".
      contents: compare the bytes of each file; otherwise only name and length.

    Raises:
      CheckpointError: the checksums have another format version.
    """
    if not (folder / COMMITTED).exists():
        return f"{folder} has no {COMMITTED}: it was not completely written or copied"
    if not (folder / CHECKSUMS).exists():
        return (
            f"{folder} has no {CHECKSUMS}: it was not completely copied; or an older version wrote it, and "
            f"`python -m tclip_jax.runs.checksums {folder}` adds them if it is whole"
        )
    entries = _read_entries(folder / CHECKSUMS)
    if entries is None:
        return f"{folder / CHECKSUMS} is damaged"
    expected = {name: entry for name, entry in entries.items() if name.startswith(part)}
    files = {name: path for name, path in files_below(folder).items() if name.startswith(part)}
    for name in files:
        if "/" in name and name not in expected and not any(piece.startswith(".") for piece in name.split("/")):
            return f"{folder / CHECKSUMS} does not list {name}"
    with ThreadPoolExecutor() as threads:
        damages = threads.map(
            lambda name: _file_damage(folder / name, files.get(name), expected[name], contents), expected
        )
        return next((line for line in damages if line), None)


def _read_entries(path: epath.Path) -> dict[str, dict[str, Any]] | None:
    """Return length and SHA-256 by file name; None if the checksums themselves are damaged."""
    try:
        stored = json.loads(path.read_text())
        if isinstance(stored, dict) and "version" in stored:
            if stored["version"] != _VERSION:
                raise CheckpointError(
                    f"{path} has version {stored['version']!r}, this tclip_jax reads version {_VERSION}: use the "
                    "release that wrote it"
                )
            stored = stored["files"]  # the first releases wrote this mapping alone
        entries = {name: {"bytes": int(entry["bytes"]), "sha256": entry["sha256"]} for name, entry in stored.items()}
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return entries or None


def _file_damage(path: epath.Path, file: epath.Path | None, entry: dict[str, Any], contents: bool) -> str | None:
    try:
        if file is None:
            return f"{path} is missing"
        if (length := file.stat().length) != entry["bytes"]:
            return f"{path} has {length} bytes instead of {entry['bytes']}"
        whole = not contents or sha256(file) == entry["sha256"]
    except OSError as error:
        return f"{path} cannot be read: {error}"
    return None if whole else f"{path} is damaged: its checksum differs"


def _entry(path: epath.Path) -> dict[str, Any]:
    return {"bytes": path.stat().length, "sha256": sha256(path)}


def files_below(folder: epath.Path, prefix: str = "") -> dict[str, epath.Path]:
    """Return all files in a folder and its sub-folders, by their path relative to it."""
    files: dict[str, epath.Path] = {}
    for path in sorted(folder.iterdir()):
        name = f"{prefix}{path.name}"
        files |= files_below(path, f"{name}/") if path.is_dir() else {name: path}
    return files


if __name__ == "__main__":
    for each in map(epath.Path, sys.argv[1:]):
        write_checksums(each)
        if not (each / COMMITTED).exists():
            write_atomic(each / COMMITTED, "accepted by hand\n")
        print(f"{each}: wrote the checksums of its files")
