"""Find what is private in files before they are published: paths, buckets, user names, secrets, states of training."""

from __future__ import annotations

import getpass
import json
import mmap
import os
import pathlib
import re
import socket
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from tclip_jax.interop.gguf_file import read_metadata
from tclip_jax.pages import printable

# Their lines are looked through for every kind of path. Elsewhere regexes and URLs of programs look like paths.
_DOCUMENTS = {"", ".cff", ".cfg", ".csv", ".ini", ".ipynb", ".json", ".jsonl", ".md", ".rst", ".toml", ".tsv", ".txt"}
_DOCUMENTS |= {".yaml", ".yml"}
_VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt")  # names of people are tokens too
_MAX_HEADER_BYTES = 100 * 2**20

_TAIL = r"(?:(?!::)[^\s|,;'\"`<>()\\\x00-\x1f\x7f-\xff])*"  # up to the end of a path, or to `::` between two
_SCHEMES = "gs|s3|s3a|s3n|r2|az|abfss?|wasbs?|adl|hdfs|viewfs|oci|cos|oss|obs|b2|dbfs|file|nfs|smb|sftp|ssh"
_STORES = r"storage\.(?:googleapis|cloud\.google)\.com|[\w.-]*\bs3[\w.-]*\.amazonaws\.com"
_STORES += r"|[\w-]+\.blob\.core\.windows\.net|[\w.-]+\.r2\.cloudflarestorage\.com"
_HOMES = "home|Users|root|mnt|media|scratch|gscratch|gpfs|lustre|nfs|Volumes|tmp|private|content/drive|kaggle/input"
_SYSTEM = "usr|bin|sbin|etc|lib|lib64|dev|proc|sys"

_BUCKET = rf"\b(?:{_SCHEMES}):///?[\w.%{{-]{_TAIL}|https?://(?:{_STORES})/{_TAIL}"
_HOME_PATH = rf"(?<![\w.~/<}}])/(?:{_HOMES})/[\w.@+-]{_TAIL}"
_ANY_PATH = rf"(?<![\w.~/<}})\]*])/(?!(?:{_SYSTEM})/)[\w.@+-]+/[\w.@+*{{-]{_TAIL}|(?<![\w/~])~[\w-]*/[\w.]{_TAIL}"
_ANY_PATH += r"|(?<![A-Za-z0-9])[A-Za-z]:[\\/]{1,2}\w[^\s|,;'\"]*"
_RUN = rf"(?<![\w/.-])runs/[\w.-]{_TAIL}"
_WORKDIR = rf"{_RUN}|\"workdir\"\s*:\s*\"[^\"\n]+"
_SECRET = r"\bhf_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36}|-----BEGIN [A-Z ]*PRIVATE KEY-----"

_EVERYWHERE = {"a bucket": _BUCKET, "an absolute path": _HOME_PATH, "a secret": _SECRET}
_NEEDLES = [b"://", b"hf_", b"AKIA", b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"-----BEGIN "]
_NEEDLES += [f"/{home}/".encode() for home in _HOMES.split("|")]
_BEFORE, _AFTER = 100, 1000  # bytes around a needle
_IN_DOCUMENTS = {"a bucket": _BUCKET, "an absolute path": _ANY_PATH, "the workdir of a run": _WORKDIR}
_IN_DOCUMENTS |= {"a secret": _SECRET}
_PATHS = re.compile("|".join((_BUCKET, _ANY_PATH, _RUN)))
# Base64, in which / is a digit, of integrity hashes and of pictures: PNG, JPEG, GIF and WebP, by their first bytes.
_ENCODED = re.compile(
    r"(?<![A-Za-z0-9+/])(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/]{16,}={0,2}"
    r"|\bsha(?:256|384|512)-[A-Za-z0-9+/]{43,86}={0,2}(?![A-Za-z0-9+/])"
)
# Names that tell nothing of who has them.
_ANYBODY = {"admin", "app", "debian", "docker", "guest", "jovyan", "localhost", "nobody", "root", "runner", "user"}
_ANYBODY |= {"ubuntu"}

# What archives and pickles hold cannot be looked through. The first byte of a pickle is followed by its protocol and an
# opcode, which is not 0 as in an offset or a length.
_OPAQUE = {rb"PK\x03\x04": "a zip archive", rb"\x1f\x8b": "gzip", rb"\x28\xb5\x2f\xfd": "zstd", rb"\xfd7zXZ": "xz"}
_OPAQUE |= {rb"BZh": "bzip2", rb"7z\xbc\xaf": "a 7z archive", rb"\x80[\x02-\x05][^\x00]": "a pickle"}

# Files and folders that only a run has: its record, its checkpoints and the states of its optimizer.
_OF_A_RUN = {"checkpoints", "tensorboard", "history.jsonl", "metrics.jsonl", "commit_success.txt", "manifest.ocdbt"}
_OF_A_RUN |= {"_METADATA", "_CHECKPOINT_METADATA", "optimizer.pt", "optimizer.bin", "scheduler.pt"}
_OF_A_RUN |= {"trainer_state.json"}
_STATE = re.compile(r"(?:^|[./])(?:opt_state|optimizer|optimizer_state|exp_avg|exp_avg_sq|mu|nu)(?:[./]|$)")


class Finding(NamedTuple):
    """Something private: the file, where in it ("line 3"), what it is ("a bucket"), and the text."""

    file: str
    place: str
    what: str
    text: str

    def __str__(self) -> str:
        text = f"{self.text[:8]}…" if self.what == "a secret" else self.text  # errors stay in logs
        return f"{self.file}, {self.place}: {self.what}, {printable(text):.100}"


def find_private(path: pathlib.Path, name: str, *, public: Collection[str] = ()) -> Iterator[Finding]:
    """Yield what is private in a file: in the text of documents, in the headers of weights, in the bytes of others.

    Args:
      path: the file.
      name: its path below the folder.
      public: texts, such as the name of the account, that are not private.

    Raises:
      ValueError: the file is an archive or a pickle, belongs to a run, or is not what its name says.
    """
    if not _OF_A_RUN.isdisjoint(name.split("/")) or path.name.startswith("events.out.tfevents"):
        raise ValueError(f"{name} belongs to a run: export the run (`tclip export`) and push that folder")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        yield from find_in_text(_safetensors_header(path, name), name, place="header", public=public)
    elif suffix == ".gguf":
        yield from find_in_text(_gguf_metadata(path, name), name, place="metadata", public=public)
    elif suffix in _DOCUMENTS:
        yield from find_in_text(read_text(path, name), name, public=public)
    else:
        _refuse_opaque(path, name)
        yield from _find_in_bytes(path, name, public)


def find_in_text(text: str, name: str, *, place: str = "", public: Collection[str] = ()) -> Iterator[Finding]:
    """Yield what is private in the lines of a document; `place` replaces the numbers of its lines."""
    text, patterns = _ENCODED.sub("", text), dict(_IN_DOCUMENTS)
    if pathlib.PurePath(name).name not in _VOCABULARY:
        patterns |= _own_names(public)
    for what, pattern in patterns.items():
        for match in re.finditer(pattern, text):
            if not _is_public(match[0], public):
                line = text.count("\n", 0, match.start()) + 1
                yield Finding(name, place or f"line {line}", what, match[0])


def shortened(text: str) -> str:
    """Replace each private path by its last name: wds:gs://bucket/cc12m/{000..999}.tar becomes wds:cc12m."""
    return _PATHS.sub(lambda match: _last_name(match[0]), text)


def _last_name(path: str) -> str:
    parts = re.sub(r"^https?://[^/]*/[^/]*|^[a-z0-9]+://[^/]*|^~[^/]*", "", path).split("/")
    named = [part for part in parts if part and not re.search(r"[*?\[{]", part)]
    return named[-1] if named else "unnamed"


def _own_names(public: Collection[str]) -> dict[str, str]:
    """Return patterns of the names of the user and the machine, unless they are those of anybody."""
    host = socket.gethostname().partition(".")[0]
    named = {"a user name": {_user(), pathlib.Path.home().name}}
    named |= {"the name of this machine": {host} if re.search(r"[\d-]", host) else set()}
    words = {what: {name for name in names if len(name) > 2 and name not in _ANYBODY} for what, names in named.items()}
    return {
        what: rf"(?<![A-Za-z0-9])(?:{'|'.join(map(re.escape, sorted(names - set(public))))})(?![A-Za-z0-9])"
        for what, names in words.items()
        if names - set(public)
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for its user
        return ""


def _is_public(text: str, public: Collection[str]) -> bool:
    return any(text.startswith(allowed) for allowed in public)


def read_text(path: pathlib.Path, name: str) -> str:
    """Return the text of a document, with / for the \\/ that some programs write in JSON."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text, as its name says: byte {error.start}") from None
    return text.replace("\\/", "/")


def _refuse_opaque(path: pathlib.Path, name: str) -> None:
    with path.open("rb") as file:
        start = file.read(8)
    for magic, kind in _OPAQUE.items():
        if re.match(magic, start):
            raise ValueError(f"{name} is {kind}, which cannot be looked through: send safetensors, or its files")


def _safetensors_header(path: pathlib.Path, name: str) -> str:
    """Return the header of a safetensors file, a line for each tensor; refuse the state of an optimizer."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length if length <= _MAX_HEADER_BYTES else 0))
            tensors = sorted(header.keys() - {"__metadata__"})
        except (ValueError, AttributeError, RecursionError):
            raise ValueError(f"{name} is not a safetensors file: its header is not JSON") from None
    states = [tensor for tensor in tensors if _STATE.search(tensor)]
    if states:
        raise ValueError(f"{name}: {printable(states[0]):.100} is the state of an optimizer: push the weights alone")
    return "\n".join([*tensors, *_strings(header.get("__metadata__", {}))])


def _gguf_metadata(path: pathlib.Path, name: str) -> str:
    """Return the texts in the metadata of a GGUF file, but for its vocabulary."""
    with path.open("rb") as file:
        try:
            metadata = read_metadata(file, os.fstat(file.fileno()).st_size)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is not a GGUF file: {error}") from None
    return "\n".join(_strings({key: value for key, value in metadata.items() if not key.startswith("tokenizer.")}))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
    elif isinstance(value, str):
        yield value


def _find_in_bytes(path: pathlib.Path, name: str, public: Collection[str]) -> Iterator[Finding]:
    """Yield what is private in the bytes of a program or another binary file; only the clearest patterns apply."""
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = {(match, what) for position in _candidates(data) for match, what in _matches_at(data, position)}
        for (start, text), what in sorted(found):
            if not _is_public(text, public):
                line = data[:start].count(b"\n") + 1
                yield Finding(name, f"line {line}", what, text)


def _candidates(data: mmap.mmap) -> Iterator[int]:
    """Yield where a text is that every match has: searching for them takes a tenth of the time of the patterns."""
    for needle in _NEEDLES:
        position = data.find(needle)
        while position >= 0:
            yield position
            position = data.find(needle, position + 1)


def _matches_at(data: mmap.mmap, position: int) -> Iterator[tuple[tuple[int, str], str]]:
    """Yield start, text and kind of each match that contains `position`."""
    start = max(0, position - _BEFORE)
    window = data[start : position + _AFTER]
    for what, pattern in _EVERYWHERE.items():
        for match in re.finditer(pattern.encode(), window):
            if match.start() <= position - start < match.end():
                yield (start + match.start(), match[0].decode("latin-1")), what
