"""The files of an artifact: their names, sizes and checksums."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from tclip_jax.artifacts.coding import largest_stored_bytes
from tclip_jax.artifacts.manifest import FLOAT_CODING, MANIFEST, TERNARY_CODING, ArtifactError
from tclip_jax.artifacts.safetensors import LazyArray, read_safetensors

TERNARY_FILE, REST_FILE = "ternary.safetensors", "rest.safetensors"
WEIGHT_FILES = {TERNARY_CODING: TERNARY_FILE, FLOAT_CODING: REST_FILE}

MAX_OTHER_BYTES = 64 * 2**20


def file_entry(data: bytes) -> dict[str, Any]:
    """What tclip.json says of a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def sha256(path: epath.Path) -> str:
    """Of a file's bytes, a piece at a time in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: epath.Path, manifest: Mapping[str, Any]) -> None:
    """Compares every file that the manifest names with its entry; the tensors in the manifest must have been checked.

    Raises:
      ArtifactError: a file that is missing, larger than its tensors can be, or not the one that the manifest describes.
    """
    limits = dict.fromkeys(WEIGHT_FILES.values(), 4096)
    for entry in manifest["tensors"].values():
        limits[WEIGHT_FILES[entry["coding"]]] += largest_stored_bytes(entry)
    for name in limits:
        if name not in manifest["files"]:
            raise ArtifactError(f"{MANIFEST}: files miss {name}")
    for name, entry in manifest["files"].items():
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ArtifactError(f"{MANIFEST}: files name {name!r:.80}: it must be a plain file name")
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise ArtifactError(f"{MANIFEST}: file {name} must have bytes and sha256, and nothing else")
        check_size(folder / name, limits.get(name, MAX_OTHER_BYTES), entry["bytes"])
        if sha256(folder / name) != entry["sha256"]:
            raise ArtifactError(f"{folder / name} is damaged: its bytes do not have the sha256 in {MANIFEST}")


def check_size(path: epath.Path, limit: int, size: Any = None) -> None:
    """Raises ArtifactError unless a file is there with at most `limit` and, where given, exactly `size` bytes."""
    if not path.exists():
        raise ArtifactError(f"{path} is missing: a complete artifact has it")
    length = path.stat().length
    if size is not None and length != size:
        raise ArtifactError(f"{path} has {length} bytes: {MANIFEST} gives {size!r:.80}")
    if length > limit:
        raise ArtifactError(f"{path} has {length} bytes: at most {limit} can be right")


def open_safetensors(path: epath.Path) -> dict[str, LazyArray]:
    """The arrays of a safetensors file, unread.

    Raises:
      ArtifactError: a file that is not one.
    """
    try:
        return read_safetensors(path)
    except ValueError as error:
        raise ArtifactError(str(error)) from None
