"""A writer of artifacts in NumPy, zstandard and JSON that follows docs/artifact.md and imports nothing of tclip_jax."""

from __future__ import annotations

import hashlib
import json
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import zstandard

Stored = dict[str, bytes]


def write(
    folder: pathlib.Path,
    model_cfg: Mapping[str, Any],
    ternary: Mapping[str, tuple[np.ndarray, np.ndarray, int, int]],
    floats: Mapping[str, np.ndarray],
    integers: Mapping[str, tuple[np.ndarray, int, np.ndarray, int, int]] = {},
) -> None:
    """Writes trits, scales, group and axis by path, and the other parameters as float32 or float16 arrays.

    Of integers it writes the values, their bits, scales, group and axis.
    """
    folder.mkdir()
    tensors, frames, rest = {}, {}, {}
    for path, (trits, scale, group, axis) in ternary.items():
        digits = np.ones(-(-trits.size // 5) * 5, np.uint8)
        digits[: trits.size] = trits.ravel() + 1
        packed = (digits.reshape(-1, 5) * np.array([1, 3, 9, 27, 81])).sum(axis=1).astype(np.uint8).tobytes()
        frames |= {f"{path}.trits": compress(packed), f"{path}.scale": compress(planes(scale))}
        tensors[path] = {"coding": "base3+zstd", "shape": trits.shape, "dtype": scale.dtype.name, "axis": axis}
        tensors[path] |= {"group": group, "scale_shape": scale.shape, "sha256": sha256(packed + scale.tobytes())}
    for path, (values, bits, scale, group, axis) in integers.items():
        codes = [int(value) % 2**bits for value in values.ravel()]
        if bits == 4:
            codes += [0] * (len(codes) % 2)
            codes = [low + 16 * high for low, high in zip(codes[::2], codes[1::2], strict=True)]
        packed = bytes(codes)
        rest |= {f"{path}.integers": compress(packed), f"{path}.scale": compress(planes(scale))}
        tensors[path] = {"coding": f"int{bits}+zstd", "shape": values.shape, "dtype": scale.dtype.name, "axis": axis}
        tensors[path] |= {"group": group, "scale_shape": scale.shape, "sha256": sha256(packed + scale.tobytes())}
    for path, value in floats.items():
        rest[path] = compress(planes(value))
        digest = sha256(value.tobytes())
        tensors[path] = {"coding": "planes+zstd", "shape": value.shape, "dtype": value.dtype.name, "sha256": digest}
    files = {"ternary.safetensors": safetensors(frames), "rest.safetensors": safetensors(rest)}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    manifest = {
        "format": "tclip",
        "format_version": 2 if integers else 1,
        "model_cfg": model_cfg,
        "preprocess_cfg": {},
        "ternary": [],
        "tensors": tensors,
        "files": {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in files.items()},
    }
    text = json.dumps(manifest | {"sha256": "0" * 64})
    start = text.rindex("0" * 64)
    (folder / "tclip.json").write_text(text[:start] + sha256(text.encode()) + text[start + 64 :])


def compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(data)


def planes(value: np.ndarray) -> bytes:
    data = value.tobytes()
    return b"".join(data[plane :: value.itemsize] for plane in range(value.itemsize))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def safetensors(arrays: Stored) -> bytes:
    header, end = {}, 0
    for name, data in arrays.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [end, end := end + len(data)]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(arrays.values())
