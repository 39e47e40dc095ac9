"""Parts of files, here or on any store that fsspec knows: read again where that fails, and kept on this machine."""

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
from typing import IO, TypeVar

from tclip_jax.data.sources.base import MAX_SAMPLE_BYTES, BadSample
from tclip_jax.data.sources.patterns import file_system, is_remote
from tclip_jax.storage import cache_folder

# Waits between attempts. A store that is away for longer costs samples, not the run.
RETRY_SECONDS = (0.1, 0.4, 1.6, 6.4)
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

Result = TypeVar("Result")


def retry(read: Callable[[], Result], name: str, error_type: type[Exception] = Exception) -> Result:
    """What `read` returns, after as many attempts as it takes of those that are allowed.

    Stores raise errors of their own libraries, which have nothing in common: by default, any error is tried again.
    Not tenacity: the loop would be its arguments, which are no shorter, and a further dependency.

    Raises:
      BadSample: all failed, or trying again is of no use.
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
    """A whole file, which errors call `name`, or else by its path.

    Raises:
      BadSample: it cannot be read; on this machine also if it is no regular file, or above MAX_SAMPLE_BYTES.
    """

    def read() -> bytes:
        if is_remote(path):
            system, place = file_system(path)
            return system.cat_file(place)
        with open(path, "rb", opener=open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadSample("unreadable", name or path, "no regular file")
            if status.st_size > MAX_SAMPLE_BYTES:
                raise BadSample("too_large", name or path, f"{status.st_size:,} bytes, more than {MAX_SAMPLE_BYTES:,}")
            return file.read(status.st_size)

    return retry(read, name or path)


def open_at_once(path: str, flags: int) -> int:
    """An opener for `open`: a pipe that no one writes to would be waited for."""
    return os.open(path, flags | os.O_NONBLOCK)


def change(status: os.stat_result) -> str:
    """What differs once a local file was written again; the beginning of its stamp, see `content.stamps`."""
    return f"{status.st_size}-{status.st_mtime_ns}-"


def open_file(path: str) -> IO[bytes]:
    """A file, open for reading."""
    if not is_remote(path):
        return open(path, "rb")
    system, place = file_system(path)
    return system.open(place, "rb")


def read_range(path: str, start: int, stop: int, *, stamp: str, name: str) -> bytes:
    """The bytes [start, stop) of a tar that had the `stamp` of `content.stamps` when it was indexed: the sample `name`.

    Raises:
      BadSample: they cannot be read, or the file is not the one that was indexed.
    """
    if is_remote(path):
        data = mirror().read(path, start, stop, stamp, name)
    else:
        data = retry(lambda: _read_local(path, start, stop, stamp, name), name)
    if len(data) != stop - start:
        raise BadSample("broken_shard", name, f"the shard has {len(data)} of the {stop - start} bytes from {start} on")
    return data


def _read_local(path: str, start: int, stop: int, stamp: str, name: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not stamp.startswith(change(os.fstat(descriptor))):
            raise BadSample("broken_shard", name, "the shard was changed after it was indexed: start again")
        return os.pread(descriptor, stop - start, start)
    finally:
        os.close(descriptor)


class Mirror:
    """Copies of remote tars with holes, which fill with the samples that are read, up to a number of bytes.

    Not fsspec's caches: filecache copies whole tars; blockcache saves its list of blocks when a file is closed, so that
    workers do not share it; neither has a bound on its bytes.

    Nothing is removed to make room: where every sample is read once an epoch, no other choice of what to keep would
    hit more often. A range begins with the header of a tar member, which is never all zeros and is written last: where
    there is one, the range is whole.
    """

    def __init__(self, folder: pathlib.Path, max_bytes: int) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._left = max_bytes - sum(entry.stat().st_blocks * 512 for entry in os.scandir(folder))
        self._lock = threading.Lock()

    def read(self, url: str, start: int, stop: int, stamp: str, name: str) -> bytes:
        """The bytes [start, stop), from the copy or, after which they are in it, from the store."""
        copy = self._folder / hashlib.sha256(f"{url}\n{stamp}".encode()).hexdigest()[:32]
        if copy.exists():
            with open(copy, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), stop - start, start)
            if len(data) == stop - start and any(data[:_HEADER]):
                return data
        data = retry(lambda: _fetch(url, start, stop), name)
        with self._lock:
            self._left -= len(data)
            room = self._left >= 0
        if room and len(data) == stop - start:
            # A full disk is no fault of the sample.
            with contextlib.suppress(OSError):
                _keep(copy, start, data)
        return data


_HEADER = 512


def _keep(copy: pathlib.Path, start: int, data: bytes) -> None:
    descriptor = os.open(copy, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        # Where the disk is filled by it, only a part is written, without an error.
        if os.pwrite(descriptor, data[_HEADER:], start + _HEADER) == len(data) - _HEADER:
            os.pwrite(descriptor, data[:_HEADER], start)
    finally:
        os.close(descriptor)


def _fetch(url: str, start: int, stop: int) -> bytes:
    system, path = file_system(url)
    return system.cat_file(path, start=start, end=stop)


@functools.cache
def mirror() -> Mirror:
    """Of this process; TCLIP_CACHE_GIB bounds it, 50 by default."""
    return Mirror(cache_folder() / "samples", int(float(os.environ.get("TCLIP_CACHE_GIB", "50")) * 2**30))
