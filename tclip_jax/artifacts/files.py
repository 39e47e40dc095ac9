"""The files of an artifact: names, sizes and checksums."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from tclip_jax.artifacts.coding import largest_stored_bytes
from tclip_jax.artifacts.manifest import MANIFEST, TERNARY_CODING, ArtifactError
from tclip_jax.artifacts.safetensors import LazyArray, read_safetensors

TERNARY_FILE, REST_FILE = "ternary.safetensors", "rest.safetensors"
WEIGHT_FILES = (TERNARY_FILE, REST_FILE)

MAX_OTHER_BYTES = 64 * 2**20


def weight_file(entry: Mapping[str, Any]) -> str:
    """Return the name of the file that holds the arrays of a tensor's entry."""
    return TERNARY_FILE if entry["coding"] == TERNARY_CODING else REST_FILE


def file_entry(path: epath.Path) -> dict[str, Any]:
    """Return the entry of a file in tclip.json: its size in bytes and its sha256."""
    return {"bytes": path.stat().length, "sha256": sha256(path)}


def sha256(path: epath.Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, reading the file in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: epath.Path, manifest: Mapping[str, Any]) -> None:
    """Check the size and checksum of every file in the manifest.

    Args:
      folder: the artifact.
      manifest: the parsed tclip.json; `check_tensors` must have accepted its tensors, which bound the file sizes.

    Raises:
      ArtifactError: a file is missing, is larger than its tensors can be, or differs from its entry.
    """
    limits = dict.fromkeys(WEIGHT_FILES, 4096)
    for entry in manifest["tensors"].values():
        limits[weight_file(entry)] += largest_stored_bytes(entry)
    for name in limits:
        if name not in manifest["files"]:
            raise ArtifactError(f"{MANIFEST}: files lacks {name}, which every artifact has")
    for name, entry in manifest["files"].items():
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ArtifactError(f"{MANIFEST}: files has the key {name!r:.80}: it must be a plain file name")
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise ArtifactError(f"{MANIFEST}: the entry of {name} must have exactly the keys bytes and sha256")
        check_size(folder / name, limits.get(name, MAX_OTHER_BYTES), entry["bytes"])
        if sha256(folder / name) != entry["sha256"]:
            raise ArtifactError(f"{folder / name} is damaged: its bytes do not have the sha256 in {MANIFEST}")


def check_size(path: epath.Path, limit: int, size: Any = None) -> None:
    """Raise ArtifactError unless `path` exists with at most `limit` bytes and, if `size` is given, exactly `size`."""
    if not path.exists():
        raise ArtifactError(_missing(path))
    length = path.stat().length
    if size is not None and length != size:
        raise ArtifactError(f"{path} has {length} bytes: {MANIFEST} gives {size!r:.80}")
    if length > limit:
        raise ArtifactError(f"{path} has {length} bytes: its limit is {limit}")


def _missing(path: epath.Path) -> str:
    """Return the error of a missing file, which says what the folder is if it is not an artifact."""
    folder = path.parent
    if path.name == MANIFEST and not folder.is_dir():
        return f"{folder}: {'a file' if folder.exists() else 'no such folder'}; expected the folder of an artifact"
    if path.name == MANIFEST and (folder / "checkpoints").is_dir():
        return f"{folder} is the workdir of a run: `tclip pack {folder} --out DIR` makes an artifact of it"
    if path.name == MANIFEST and any((folder / name).exists() for name in ("open_clip_config.json", "config.json")):
        return f"{folder} is a checkpoint of another library: `tclip import {folder} --out DIR` makes an artifact of it"
    return f"{path} is missing: a complete artifact has it"


def open_safetensors(path: epath.Path) -> dict[str, LazyArray]:
    """Return the arrays of a safetensors file by name, lazily.

    Raises:
      ArtifactError: the file is damaged or not a safetensors file.
    """
    try:
        return read_safetensors(path)
    except ValueError as error:
        raise ArtifactError(str(error)) from None
