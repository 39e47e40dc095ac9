"""Digests of the contents of files: of a local file's bytes, or the checksum that a store gives for a remote file.

Each local file is read once. Its digest is stored in the cache folder, keyed by path, size, times and inode, so later
starts need only a stat per file. A changed file has another change time (ctime), which no program can set.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import fcntl
import hashlib
import itertools
import logging
import os
import pathlib
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tqdm

from tclip_jax.data.sources.base import BadSample
from tclip_jax.data.sources.remote import file_system, is_remote, open_nonblocking, retry, size_and_mtime
from tclip_jax.storage import cache_folder

# Names of checksums in the metadata of stores, the best first. An ETag may differ between copies that were uploaded in
# different parts; such copies count as different.
_CHECKSUMS: tuple[str, ...] = (
    *("md5Hash", "Content-MD5", "content_md5", "md5", "sha256", "Digest", "crc32c"),
    *("ETag", "etag", "generation", "blob_id", "content_hash"),
)
_TIMES = ("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created", "modificationTime")
_MIN_LISTED = 64  # files of one remote folder: from this number on, the folder is listed, without a request per file
_THREADS = 32
_CHUNK, _STAT_CHUNK = 1024, 64  # files processed together; files that one thread stats
_RECENT_NS = 2_000_000_000  # a file changed this recently may change again within the same tick of its times
_COMMIT_SECONDS = 5.0
_MANY_BYTES = 1 << 30

_logger = logging.getLogger(__name__)
_warnings, _warnings_lock = set[str](), threading.Lock()


def contents(paths: Iterable[str], *, total: int | None = None, max_bytes: int | None = None) -> Iterator[str]:
    """Yield a digest of each file's content, in order; files with equal content have equal digests on every host.

    Args:
      paths: local paths or URLs.
      total: number of paths, for the progress bar.
      max_bytes: a larger local file, which is never used, is identified by its size without being read.
    """
    bar = tqdm.tqdm(total=total, desc="content", unit="file", delay=2, disable=not sys.stderr.isatty())
    remaining = iter(paths)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool, contextlib.closing(bar):
        while chunk := list(itertools.islice(remaining, _CHUNK)):
            digests = _contents(list(dict.fromkeys(chunk)), max_bytes, pool, bar)
            yield from (digests[path] for path in chunk)


def combined(parts: Iterable[str]) -> str:
    """Return a digest (32 hexadecimal digits) of strings in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogateescape")
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()


def stamps(paths: Sequence[str]) -> list[str]:
    """Return a string per file that changes when the file does, without reading it.

    A local file's stamp has its size, times and inode, and starts with `size_and_mtime`. A remote file's stamp is the
    checksum that its store gives.
    """
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        by_path = _stamps(list(dict.fromkeys(paths)), pool)
    return [by_path[path] for path in paths]


@contextlib.contextmanager
def exclusive(path: pathlib.Path) -> Iterator[None]:
    """Let one process at a time run the block. The system releases the lock when a process ends."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _contents(
    paths: list[str], max_bytes: int | None, pool: concurrent.futures.Executor, bar: tqdm.tqdm[Any]
) -> dict[str, str]:
    result = _stamps(paths, pool)
    local = {path: stamp for path, stamp in result.items() if not is_remote(path) and "-" in stamp}
    for path, size in ((path, int(stamp.partition("-")[0])) for path, stamp in local.items()):
        if max_bytes is not None and size > max_bytes:
            result[path] = f"{size} bytes"
    local = {path: stamp for path, stamp in local.items() if result[path] == stamp}
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(contextlib.closing(_DigestCache()))
        digests = cache.load(local)
        if len(digests) < len(local):
            # Processes of one machine must not read the same files: one reads, and the others use its digests.
            stack.enter_context(cache.exclusive())
            digests = cache.load(local)
        bar.update(len(paths) - len(local) + len(digests))
        unread = [path for path in local if path not in digests]
        size = sum(int(local[path].partition("-")[0]) for path in unread)
        if size > _MANY_BYTES:
            _logger.info("reading %d files (%.1f GB) once, to store digests of their contents", len(unread), size / 1e9)
        for path, digest in zip(unread, pool.map(_read, unread), strict=True):
            digests[path] = digest
            cache.store(path, local[path], digest)
            bar.update()
    return result | digests


def _read(path: str) -> str:
    """Return the digest of a file's bytes, or why it cannot be read."""
    try:
        with open(path, "rb", buffering=0, opener=open_nonblocking) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return "no regular file"
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except FileNotFoundError:
        return "missing"
    except OSError:
        return "unreadable"


class _DigestCache:
    """The digests of local files in content.sqlite of the cache folder. If the database fails, nothing is cached."""

    def __init__(self) -> None:
        self._database: sqlite3.Connection | None = None
        self._committed = time.monotonic()
        folder = cache_folder()
        with self._optional():
            folder.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(folder / "content.sqlite", timeout=60)
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS content (path BLOB PRIMARY KEY, stamp TEXT, content TEXT) WITHOUT ROWID"
            )

    def load(self, stamped: Mapping[str, str]) -> dict[str, str]:
        """Return the digests of the files whose stamps have not changed since they were read."""
        rows: list[tuple[bytes, str, str]] = []
        with self._optional():
            if self._database and stamped:
                marks = ",".join("?" * len(stamped))
                query = f"SELECT path, stamp, content FROM content WHERE path IN ({marks})"
                rows = self._database.execute(query, [os.fsencode(path) for path in stamped]).fetchall()
        return {name: digest for path, stamp, digest in rows if stamped[name := os.fsdecode(path)] == stamp}

    def store(self, path: str, stamp: str, digest: str) -> None:
        """Store a digest, unless the file was changed during the read or just before it."""
        changed = max(map(int, stamp.split("-")[1:3]))
        if not self._database or _local_stamp(path) != stamp or time.time_ns() - changed < _RECENT_NS:
            return
        with self._optional():
            self._database.execute(
                "INSERT OR REPLACE INTO content VALUES (?, ?, ?)", (os.fsencode(path), stamp, digest)
            )
            if time.monotonic() - self._committed > _COMMIT_SECONDS:
                self._database.commit()
                self._committed = time.monotonic()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Let one process at a time run the block, then commit."""
        with contextlib.ExitStack() as stack:
            with self._optional() if self._database else contextlib.suppress(OSError):
                stack.enter_context(exclusive(cache_folder() / "content.lock"))
            yield
            with self._optional():
                if self._database:
                    self._database.commit()

    def close(self) -> None:
        database, self._database = self._database, None
        if database:
            database.close()

    @contextlib.contextmanager
    def _optional(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            self.close()
            _warn_once(f"{cache_folder()}/content.sqlite cannot be used, so every start reads all files ({error})")


def _stamps(paths: Sequence[str], pool: concurrent.futures.Executor) -> dict[str, str]:
    local = [path for path in paths if not is_remote(path)]
    chunks = [local[start : start + _STAT_CHUNK] for start in range(0, len(local), _STAT_CHUNK)]
    result = {path: stamp for chunk in pool.map(_local_stamps, chunks) for path, stamp in chunk}
    folders = collections.defaultdict[str, list[str]](list)
    for path in paths:
        if is_remote(path):
            folders[path.rpartition("/")[0]].append(path)
    for folder, urls in folders.items():
        result |= _remote_stamps(folder, urls, pool)
    return result


def _local_stamps(paths: Iterable[str]) -> list[tuple[str, str]]:
    return [(path, _local_stamp(path)) for path in paths]


def _local_stamp(path: str) -> str:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return "missing"
    except OSError:
        return "unreadable"
    if not stat.S_ISREG(status.st_mode):
        return "no regular file"
    return f"{size_and_mtime(status)}{status.st_ctime_ns}-{status.st_ino}"


def _remote_stamps(folder: str, urls: Sequence[str], pool: concurrent.futures.Executor) -> dict[str, str]:
    try:
        system, _ = file_system(urls[0])
    except ValueError:
        return dict.fromkeys(urls, "unreadable")
    listing: dict[str, Any] = {}
    if len(urls) >= _MIN_LISTED and not folder.startswith("http"):
        with contextlib.suppress(BadSample):
            listing = {entry["name"]: entry for entry in retry(lambda: system.ls(folder, detail=True), folder)}

    def stamp(url: str) -> str:
        try:
            path = system._strip_protocol(url)
            return _checksum(listing.get(path) or retry(lambda: system.info(url), url), folder)
        except BadSample as error:
            return "missing" if isinstance(error.__cause__, FileNotFoundError) else "unreadable"

    return dict(zip(urls, pool.map(stamp, urls), strict=True))


def _checksum(metadata: Mapping[str, Any], folder: str) -> str:
    """Return the checksum in a store's metadata of a file, or the size and time."""
    # Azure nests it in content_settings, the Hugging Face hub in lfs.
    nested = [value for value in metadata.values() if isinstance(value, Mapping)]
    values = {name: value for mapping in (*nested, metadata) for name, value in mapping.items()}
    for name in _CHECKSUMS:
        if value := values.get(name):
            text = bytes(value).hex() if isinstance(value, (bytes, bytearray)) else str(value)
            return f"{name} {text} {values.get('size')}"
    store = folder.partition("://")[0]
    modified = next((str(values[name]) for name in _TIMES if values.get(name)), "")
    known = "size and time" if modified else "size"
    _warn_once(
        f"{store}:// gives no checksums: files are identified by {known}, so replacing a file by one with the same "
        f"{known} is not detected"
    )
    return f"size {values.get('size')} {modified}"


def _warn_once(message: str) -> None:
    """Log a warning once per process."""
    with _warnings_lock:
        if message not in _warnings:
            _warnings.add(message)
            _logger.warning("%s", message)
