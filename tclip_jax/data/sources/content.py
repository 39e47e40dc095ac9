"""What files hold: a digest of the bytes of a local one, the checksum that a store keeps of a remote one.

A local file is read once: its digest is remembered in the cache folder by its path, size, times and inode, so that
the next start costs a stat a file. A changed file has another time of change, which nobody can set.
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
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tqdm

from tclip_jax.data.sources.base import BadSample
from tclip_jax.data.sources.patterns import file_system, is_remote
from tclip_jax.data.sources.remote import change, open_at_once, retry
from tclip_jax.storage import cache_folder

# What stores call a checksum, the best first; an etag differs between copies of other parts, which is on the safe side.
_CHECKSUMS: tuple[str, ...] = (
    *("md5Hash", "Content-MD5", "content_md5", "md5", "sha256", "Digest", "crc32c"),
    *("ETag", "etag", "generation", "blob_id", "content_hash"),
)
_TIMES = ("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created", "modificationTime")
_LISTED_FROM = 64  # files of one remote folder: from here on it is listed, instead of a request a file
_THREADS = 32
_CHUNK, _PART = 1024, 64  # files at a time, and those of one thread that asks for their stamps
_RECENT_NS = 2_000_000_000  # a file that was changed so lately may change again without another time
_COMMIT_SECONDS = 5.0
_MANY_BYTES = 1 << 30

_logger = logging.getLogger(__name__)
_said, _saying = set[str](), threading.Lock()


def contents(paths: Iterable[str], *, total: int | None = None, max_bytes: int | None = None) -> Iterator[str]:
    """What each file holds, in order: equal of equal files on every host, wherever they lie.

    Args:
      paths: local or URLs.
      total: how many, for the progress bar.
      max_bytes: a local file above that counts by its size alone, since it is never read.
    """
    bar = tqdm.tqdm(total=total, desc="content", unit="file", delay=2, disable=not sys.stderr.isatty())
    remaining = iter(paths)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool, contextlib.closing(bar):
        while chunk := list(itertools.islice(remaining, _CHUNK)):
            found = _contents(list(dict.fromkeys(chunk)), max_bytes, pool, bar)
            yield from (found[path] for path in chunk)


def combined(parts: Iterable[str]) -> str:
    """32 hexadecimal digits of all parts in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogateescape")
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()


def stamps(paths: Sequence[str]) -> list[str]:
    """What changes when a file does, without reading it: size, times and inode; of a remote file what its store says.

    Of a local file it begins with `change(os.stat(path))`.
    """
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = _stamps(list(dict.fromkeys(paths)), pool)
    return [found[path] for path in paths]


def _contents(
    paths: list[str], max_bytes: int | None, pool: concurrent.futures.Executor, bar: tqdm.tqdm[Any]
) -> dict[str, str]:
    found = _stamps(paths, pool)
    local = {path: stamp for path, stamp in found.items() if not is_remote(path) and "-" in stamp}
    for path, size in ((path, int(stamp.partition("-")[0])) for path, stamp in local.items()):
        if max_bytes is not None and size > max_bytes:
            found[path] = f"{size} bytes"
    local = {path: stamp for path, stamp in local.items() if found[path] == stamp}
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(contextlib.closing(_Memory()))
        known = memory.known(local)
        if len(known) < len(local):
            # Processes of one machine read different files, or wait for what another is reading.
            stack.enter_context(memory.alone())
            known = memory.known(local)
        bar.update(len(paths) - len(local) + len(known))
        wanted = [path for path in local if path not in known]
        size = sum(int(local[path].partition("-")[0]) for path in wanted)
        if size > _MANY_BYTES:
            _logger.info("reading %d files of %.1f GB once, to know their content again", len(wanted), size / 1e9)
        for path, content in zip(wanted, pool.map(_read, wanted), strict=True):
            known[path] = content
            memory.remember(path, local[path], content)
            bar.update()
    return found | known


def _read(path: str) -> str:
    """The digest of a file's bytes, or what keeps it from being read."""
    try:
        with open(path, "rb", buffering=0, opener=open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return "no regular file"
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except FileNotFoundError:
        return "missing"
    except OSError:
        return "unreadable"


class _Memory:
    """What was read before: content.sqlite of the cache folder. Where that cannot be used, all is read again."""

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

    def known(self, stamped: Mapping[str, str]) -> dict[str, str]:
        """The contents of the files that still have the stamp that they had when they were read."""
        rows: list[tuple[bytes, str, str]] = []
        with self._optional():
            if self._database and stamped:
                marks = ",".join("?" * len(stamped))
                query = f"SELECT path, stamp, content FROM content WHERE path IN ({marks})"
                rows = self._database.execute(query, [os.fsencode(path) for path in stamped]).fetchall()
        return {name: content for path, stamp, content in rows if stamped[name := os.fsdecode(path)] == stamp}

    def remember(self, path: str, stamp: str, content: str) -> None:
        """Keeps the content of a file that has not changed while it was read, nor just before."""
        changed = max(map(int, stamp.split("-")[1:3]))
        if not self._database or _local_stamp(path) != stamp or time.time_ns() - changed < _RECENT_NS:
            return
        with self._optional():
            self._database.execute(
                "INSERT OR REPLACE INTO content VALUES (?, ?, ?)", (os.fsencode(path), stamp, content)
            )
            if time.monotonic() - self._committed > _COMMIT_SECONDS:
                self._database.commit()
                self._committed = time.monotonic()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One process at a time does what is in the block; a killed one does not keep the others out."""
        with contextlib.ExitStack() as stack:
            with self._optional() if self._database else contextlib.suppress(OSError):
                file = stack.enter_context(open(cache_folder() / "content.lock", "w"))
                fcntl.flock(file, fcntl.LOCK_EX)
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
            _say(f"{cache_folder()}/content.sqlite cannot be used, so files are read at every start ({error})")


def _stamps(paths: Sequence[str], pool: concurrent.futures.Executor) -> dict[str, str]:
    local = [path for path in paths if not is_remote(path)]
    parts = [local[start : start + _PART] for start in range(0, len(local), _PART)]
    found = {path: stamp for part in pool.map(_local_stamps, parts) for path, stamp in part}
    folders = collections.defaultdict[str, list[str]](list)
    for path in paths:
        if is_remote(path):
            folders[path.rpartition("/")[0]].append(path)
    for folder, urls in folders.items():
        found |= _remote_stamps(folder, urls, pool)
    return found


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
    return f"{change(status)}{status.st_ctime_ns}-{status.st_ino}"


def _remote_stamps(folder: str, urls: Sequence[str], pool: concurrent.futures.Executor) -> dict[str, str]:
    try:
        system, _ = file_system(urls[0])
    except ValueError:
        return dict.fromkeys(urls, "unreadable")
    listed: dict[str, Any] = {}
    if len(urls) >= _LISTED_FROM and not folder.startswith("http"):
        with contextlib.suppress(BadSample):
            listed = {entry["name"]: entry for entry in retry(lambda: system.ls(folder, detail=True), folder)}

    def stamp(url: str) -> str:
        try:
            path = system._strip_protocol(url)
            return _stated(listed.get(path) or retry(lambda: system.info(url), url), folder)
        except BadSample as error:
            return "missing" if isinstance(error.__cause__, FileNotFoundError) else "unreadable"

    return dict(zip(urls, pool.map(stamp, urls), strict=True))


def _stated(about: Mapping[str, Any], folder: str) -> str:
    """The checksum in what a store says of a file, or its size and time."""
    nested = [each for each in about.values() if isinstance(each, Mapping)]  # content_settings of Azure, lfs of the hub
    everything = {name: value for each in (*nested, about) for name, value in each.items()}
    for name in _CHECKSUMS:
        if value := everything.get(name):
            text = bytes(value).hex() if isinstance(value, (bytes, bytearray)) else str(value)
            return f"{name} {text} {everything.get('size')}"
    store = folder.partition("://")[0]
    time_stated = next((str(everything[name]) for name in _TIMES if everything.get(name)), "")
    _say(
        f"{store}:// states no checksum of its files: they are known by size{' and time' * bool(time_stated)},"
        " so one that is replaced by another of the same goes unnoticed"
    )
    return f"size {everything.get('size')} {time_stated}"


def _say(what: str) -> None:
    """Once in a process, by whichever thread."""
    with _saying:
        if what not in _said:
            _said.add(what)
            _logger.warning("%s", what)
