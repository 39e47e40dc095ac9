"""Reads of files and parts of files, local or on any store that fsspec supports, with retries and a local cache."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pathlib
import stat
import threading
import time
from collections.abc import Callable
from typing import IO, Any, TypeVar

from tclip_jax.data.sources.base import MAX_SAMPLE_BYTES, BadSample
from tclip_jax.storage import cache_folder

# Seconds between attempts. A longer outage of a store masks samples but does not stop the run.
RETRY_SECONDS = (0.1, 0.4, 1.6, 6.4)
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_HEADER = 512  # bytes of the header of a tar member

Result = TypeVar("Result")


def is_remote(path: str) -> bool:
    """Whether the path is a URL."""
    return "://" in path


def file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it.

    Raises:
      ValueError: the protocol is unknown, or its package is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url}: {error}") from None


def retry(read: Callable[[], Result], name: str, error_type: type[Exception] = Exception) -> Result:
    """Call `read` until it succeeds, at most `len(RETRY_SECONDS) + 1` times.

    The library tenacity is not used: its arguments would be as long as this loop.

    Args:
      read: the function.
      name: name of the sample or file, for the error.
      error_type: the errors after which `read` is called again; all by default, because the libraries of stores have
        no common error type.

    Raises:
      BadSample: all attempts failed, or the error is permanent.
    """
    for seconds in (*RETRY_SECONDS, None):
        try:
            return read()
        except BadSample:
            raise
        except error_type as error:
            if seconds is None or isinstance(error, _PERMANENT):
                raise BadSample("unreadable", name, f"{type(error).__name__}: {error}") from error
            time.sleep(seconds)
    raise AssertionError


def read_file(path: str, name: str = "") -> bytes:
    """Read a whole file.

    Args:
      path: local path or URL.
      name: name of the sample, for errors; the path by default.

    Raises:
      BadSample: the file cannot be read; or it is local and not a regular file, or larger than MAX_SAMPLE_BYTES.
    """

    def read() -> bytes:
        if is_remote(path):
            system, remote_path = file_system(path)
            return system.cat_file(remote_path)
        with open(path, "rb", opener=open_nonblocking) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadSample("unreadable", name or path, "not a regular file")
            if status.st_size > MAX_SAMPLE_BYTES:
                raise BadSample("too_large", name or path, f"{status.st_size:,} bytes, more than {MAX_SAMPLE_BYTES:,}")
            return file.read(status.st_size)

    return retry(read, name or path)


def open_nonblocking(path: str, flags: int) -> int:
    """An opener for `open` that does not wait for the writer of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def size_and_mtime(status: os.stat_result) -> str:
    """Return the start of a local file's stamp (`content.stamps`), which changes when the file is written."""
    return f"{status.st_size}-{status.st_mtime_ns}-"


def open_file(path: str) -> IO[bytes]:
    """Open a local file or a URL for reading."""
    if not is_remote(path):
        return open(path, "rb")
    system, remote_path = file_system(path)
    return system.open(remote_path, "rb")


def read_range(path: str, start: int, stop: int, *, stamp: str, name: str) -> bytes:
    """Read the bytes [start, stop) of a tar.

    Args:
      path: local path or URL.
      start: first byte, the start of a tar header.
      stop: end of the range.
      stamp: the tar's stamp (`content.stamps`) in the index.
      name: name of the sample, for errors.

    Raises:
      BadSample: the bytes cannot be read, or the tar has changed since it was indexed.
    """
    if is_remote(path):
        data = mirror().read(path, start, stop, stamp, name)
    else:
        data = retry(lambda: _read_local(path, start, stop, stamp, name), name)
    if len(data) != stop - start:
        raise BadSample("broken_shard", name, f"the shard has only {len(data)} of {stop - start} bytes at byte {start}")
    return data


def _read_local(path: str, start: int, stop: int, stamp: str, name: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not stamp.startswith(size_and_mtime(os.fstat(descriptor))):
            raise BadSample("broken_shard", name, "the shard was changed after it was indexed: restart")
        return os.pread(descriptor, stop - start, start)
    finally:
        os.close(descriptor)


class Mirror:
    """A cache of samples of remote tars: sparse copies of the tars, filled as samples are read, up to `max_bytes`.

    fsspec's caches are not used: filecache copies whole tars, blockcache saves its list of blocks only when a file is
    closed, so workers cannot share it, and neither bounds its size.

    There is no eviction: each epoch reads every sample once, so any subset gives the same hit rate. A range starts with
    the header of a tar member, which is never all zeros. The header is written last, so a range with a header is
    complete.
    """

    def __init__(self, folder: pathlib.Path, max_bytes: int) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._free = max_bytes - sum(entry.stat().st_blocks * 512 for entry in os.scandir(folder))
        self._lock = threading.Lock()

    def read(self, url: str, start: int, stop: int, stamp: str, name: str) -> bytes:
        """Read the bytes [start, stop) from the copy. If it lacks them, read them from the store and add them."""
        copy = self._folder / hashlib.sha256(f"{url}\n{stamp}".encode()).hexdigest()[:32]
        if copy.exists():
            with open(copy, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), stop - start, start)
            if len(data) == stop - start and any(data[:_HEADER]):
                return data
        data = retry(lambda: _fetch(url, start, stop), name)
        with self._lock:
            self._free -= len(data)
            fits = self._free >= 0
        if fits and len(data) == stop - start:
            # A full disk must not make the sample bad.
            with contextlib.suppress(OSError):
                _write_range(copy, start, data)
        return data


def _write_range(copy: pathlib.Path, start: int, data: bytes) -> None:
    descriptor = os.open(copy, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        # If the disk becomes full, pwrite writes a part and raises no error.
        if os.pwrite(descriptor, data[_HEADER:], start + _HEADER) == len(data) - _HEADER:
            os.pwrite(descriptor, data[:_HEADER], start)
    finally:
        os.close(descriptor)


def _fetch(url: str, start: int, stop: int) -> bytes:
    system, path = file_system(url)
    return system.cat_file(path, start=start, end=stop)


@functools.cache
def mirror() -> Mirror:
    """Return this process's cache of remote samples. TCLIP_CACHE_GIB bounds it; the default is 50 GiB."""
    return Mirror(cache_folder() / "samples", int(float(os.environ.get("TCLIP_CACHE_GIB", "50")) * 2**30))
