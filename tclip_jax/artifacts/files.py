"""The files of an artifact: their names, sizes and checksums."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.numpy
from etils import epath

from tclip_jax.artifacts.coding import Stored, largest_stored_bytes
from tclip_jax.artifacts.manifest import FLOAT_CODING, MANIFEST, TERNARY_CODING, ArtifactError

TERNARY_FILE, REST_FILE = "ternary.safetensors", "rest.safetensors"
WEIGHT_FILES = {TERNARY_CODING: TERNARY_FILE, FLOAT_CODING: REST_FILE}

MAX_OTHER_BYTES = 64 * 2**20


def file_entry(data: bytes) -> dict[str, Any]:
    """What tclip.json says of a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_files(folder: epath.Path, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """The content of every file that the manifest names; its tensors must have been checked.

    Raises:
      ArtifactError: a file that is missing, larger than its tensors can be, or not the one that the manifest describes.
    """
    limits = dict.fromkeys(WEIGHT_FILES.values(), 4096)
    for entry in manifest["tensors"].values():
        limits[WEIGHT_FILES[entry["coding"]]] += largest_stored_bytes(entry)
    for name in limits:
        if name not in manifest["files"]:
            raise ArtifactError(f"{MANIFEST}: files miss {name}")
    contents = {}
    for name, entry in manifest["files"].items():
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ArtifactError(f"{MANIFEST}: files name {name!r:.80}: it must be a plain file name")
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise ArtifactError(f"{MANIFEST}: file {name} must have bytes and sha256, and nothing else")
        contents[name] = read_bounded(folder / name, limits.get(name, MAX_OTHER_BYTES), entry["bytes"])
        if file_entry(contents[name]) != entry:
            raise ArtifactError(f"{folder / name} is damaged: its bytes do not have the sha256 in {MANIFEST}")
    return contents


def read_bounded(path: epath.Path, limit: int, size: Any = None) -> bytes:
    """The bytes of a file, read only if there are at most `limit` and, where given, exactly `size` of them."""
    if not path.exists():
        raise ArtifactError(f"{path} is missing: a complete artifact has it")
    length = path.stat().length
    if size is not None and length != size:
        raise ArtifactError(f"{path} has {length} bytes: {MANIFEST} gives {size!r:.80}")
    if length > limit:
        raise ArtifactError(f"{path} has {length} bytes: at most {limit} can be right")
    return path.read_bytes()


def parse_safetensors(data: bytes, file: str) -> Stored:
    """The arrays of a safetensors file.

    Raises:
      ArtifactError: bytes that are not one.
    """
    try:
        return safetensors.numpy.load(data)
    # An element type that NumPy lacks is a KeyError.
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"{file} is not a readable safetensors file: {error}") from None
