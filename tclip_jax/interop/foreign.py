"""What a file or folder is that holds no weights of the kinds that are read: said in its error."""

from __future__ import annotations

import re
import zipfile

from etils import epath

PYTORCH, SAFETENSORS, GGUF = "a PyTorch file", "a safetensors file", "a GGUF"

_HEAD = 512
_MAX_MEMBERS = 10_000
# Tested in this order on the first bytes.
_BEGINNINGS = (
    (rb"\s*<(!doctype html|html|\?xml|head|!--)", "a page of the web (HTML), not the file behind it"),
    (rb"version https://git-lfs\.github\.com/", "a pointer of Git LFS: `git lfs pull` gets the file itself"),
    (rb"GGUF", GGUF),
    (rb"\x89HDF\r\n", "an HDF5 file, of Keras or TensorFlow"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"PAR1", "a Parquet table"),
    (rb".{4}TFL3", "a model of TensorFlow Lite"),
    (rb"\x1f\x8b|\xfd7zXZ|BZh\d|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "a compressed file: unpack it first"),
    (rb".{257}ustar", "a tar archive: unpack it first"),
    (rb"\x08[\x01-\x0f]\x12.[\w./-]", "an ONNX model"),
    (rb"\x08\x01\x12", "a SavedModel of TensorFlow"),
    (rb"\x80[\x02-\x05]", PYTORCH),
    (rb".{6}\0\0\{", SAFETENSORS),
    (rb"(\x81|\x82|[\x83-\x8f]|\xde..|\xdf....)[\xa1-\xbf\xd9]", "parameters of Flax (msgpack)"),
    (rb"\s*[{\[]", "JSON text"),
    (rb"\0{64}", "nothing but zeros, as an unfinished download leaves it"),
)
_FILES = (
    ("adapter_config.json", "an adapter (LoRA): merge it into its model first, and save that"),
    ("*.msgpack", "weights of Flax"),
    ("*.h5", "weights of Keras or TensorFlow"),
    ("saved_model.pb", "a SavedModel of TensorFlow"),
    ("*.ckpt*.index", "a checkpoint of TensorFlow"),
    ("*.onnx", "an ONNX model"),
    ("*.tflite", "a model of TensorFlow Lite"),
    ("*.gguf", "a GGUF: give that file itself"),
    ("*.npz", "NumPy arrays"),
)


def file_kind(path: epath.Path) -> str | None:
    """What a file is by its first bytes (of a zip archive, by its members), in words; None if they do not tell."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head.startswith(b"PK\3\4"):
        return _zip_kind(path)
    for pattern, words in _BEGINNINGS:
        if re.match(pattern, head.lower() if b"html" in pattern else head, re.DOTALL):
            return words
    return None


def check_file_kind(path: epath.Path, expected: str) -> None:
    """Raises ValueError for a file that is known to be of another kind, naming both."""
    kind = file_kind(path)
    if kind not in (None, expected):
        raise ValueError(f"{path} is not {expected}, but {kind}") from None


def folder_kind(path: epath.Path) -> str:
    """What else lies in a folder without weights, as an addition to its error; empty if nothing that is known."""
    for pattern, words in _FILES:
        for file in sorted(path.glob(pattern)):
            return f"; its {file.name} is {words}"
    return ""


def _zip_kind(path: epath.Path) -> str:
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()[:_MAX_MEMBERS]
    # A damaged directory raises almost anything.
    except Exception:
        return PYTORCH if path.suffix != ".zip" else "a damaged zip archive"
    if any(name.endswith((".pkl", "/version")) for name in names):
        return PYTORCH
    if any(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (.npz)"
    return "a zip archive: unpack it first"
