"""The index of a sharded data set: how many samples each shard has, and where they lie; a folder on local disk.

The folder is made once for shards of these names and stamps (`content.stamps`), and read in place, so that a billion
samples start as fast as a thousand:

    index.json    {"version": 3, "kind": "tar" or "arrayrecord", "samples": N, "shards": S,
                  "passed_over": {"kinds": {suffix or word: files}, "first": name}}
    shards.txt    S lines: the path or URL of each shard
    stamps.txt    S lines: what changes when that shard does
    starts.npy    (S + 1,) int64: the number of the first sample of each shard, and N
    sizes.npy     (S,) int64: bytes of each shard when it was indexed; −1 of a shard that could not be read
    faults.npy    (S,) uint8: of what is wrong with the shard, in FAULTS; its last sample then stands for what is lost
    samples.bin   N rows of SAMPLE, of tars alone: 32 bytes a sample

`write_sparse_index` writes one of any size whose samples.bin is a hole, to try what size costs.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import functools
import json
import multiprocessing
import os
import pathlib
import shutil
import struct
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tqdm

from tclip_jax import keys
from tclip_jax.data.files import PassedOver
from tclip_jax.data.sources.base import FAULTS, BadSample
from tclip_jax.data.sources.content import combined, contents, stamps
from tclip_jax.schema import plain
from tclip_jax.storage import atomic_folder, cache_folder, write_atomic

# Where a sample lies in its tar: `start` is the header of its first file; `image` and `text` are counted from there.
SAMPLE = np.dtype(
    [
        ("start", "<i8"),
        ("image", "<u4"),
        ("image_size", "<u4"),  # 0: there is none
        ("text", "<u4"),
        ("text_size", "<u4"),  # 0: there is none
        ("fault", "u1"),
        ("unused", "V7"),
    ]
)

_VERSION = 3
_PART = struct.Struct("<Bqq")  # the fault, the size and the number of samples of one shard, before its rows
_MANY_SHARDS = 64


class Scan(NamedTuple):
    """What is found in one shard; `rows` (samples,) SAMPLE for tars, else None. A fault has a sample of its own.

    `passed` counts the files of a tar that belong to no sample.
    """

    size: int
    samples: int
    fault: int = 0
    rows: npt.NDArray[np.void] | None = None
    passed: PassedOver | None = None


class ShardIndex:
    """An index folder, open for reading.

    Attributes:
      folder: where it lies.
      shards: path or URL of each.
      stamps: of each, see `content.stamps`.
      sizes: (S,) int64 bytes of each.
      notes: what was passed over in the shards.

    Raises:
      ValueError: not a whole index of this version.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        try:
            about = json.loads((folder / "index.json").read_text())
            version, samples = about["version"], about["samples"]
            passed = str(PassedOver(**about["passed_over"]))
            self.shards, self.stamps = (
                (folder / f"{name}.txt").read_text().split("\n")[:-1] for name in ("shards", "stamps")
            )
            # Mapped, and then copied: a header that promises more than the file holds is refused.
            self._starts, self.sizes, self._faults = (
                np.array(np.load(folder / f"{name}.npy", "r", allow_pickle=False))
                for name in ("starts", "sizes", "faults")
            )
            rows = folder / "samples.bin"
            whole = rows.stat().st_size == samples * SAMPLE.itemsize if rows.exists() else about["kind"] != "tar"
        # NumPy parses a header as Python does, and raises almost anything at a damaged one.
        except Exception as error:
            reason = plain(error, 200)
            raise ValueError(f"{folder}: not a whole index; delete the folder to make it again ({reason})") from None
        count = len(self.shards)
        forms = [(array.shape, array.dtype) for array in (self._starts, self.sizes, self._faults)]
        whole = whole and type(samples) is int and version == _VERSION and len(self.stamps) == count
        whole = whole and forms == [((count + 1,), np.int64), ((count,), np.int64), ((count,), np.uint8)]
        ordered = whole and (np.diff(self._starts) >= 0).all() and (self._faults < len(FAULTS)).all()
        if not ordered or (self._starts[0], self._starts[-1]) != (0, samples):
            raise ValueError(f"{folder}: not a whole index of version {_VERSION}; delete the folder to make it again")
        self._samples = int(samples)
        where = self.shards[0] + (f" and {count - 1:,} more" if count > 1 else "")
        self.notes = [f"{where}: {passed}"] if passed else []

    def __len__(self) -> int:
        return self._samples

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardIndex, (self.folder,)

    @functools.cached_property
    def digest(self) -> str:
        """Of the contents of the shards, in their order."""
        return combined(contents(self.shards, total=len(self.shards)))

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the shard that has a sample, and the sample's place in it.

        Raises:
          BadSample: the sample stands for what the shard has lost.
        """
        if not 0 <= index < self._samples:
            raise IndexError(f"sample {index} of {self._samples}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        if self._faults[shard] and index == self._starts[shard + 1] - 1:
            kind: Any = FAULTS[self._faults[shard]]
            raise BadSample(kind, self.shards[shard], _LOST.get(kind, "it stands for what the shard has lost"))
        return shard, index - int(self._starts[shard])

    def sample(self, index: int) -> np.void:
        """The SAMPLE of a tar."""
        # Not a memory map, whose pages would count as this process's memory, in time all of them.
        data = os.pread(self._descriptor, SAMPLE.itemsize, index * SAMPLE.itemsize)
        return np.frombuffer(data, SAMPLE)[0]

    @functools.cached_property
    def _descriptor(self) -> int:
        descriptor = os.open(self.folder / "samples.bin", os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor


_LOST = {
    "broken_shard": "the shard is damaged from here on: samples after this one are lost",
    "empty_shard": "the shard holds no sample",
    "unreadable": "the shard could not be read when it was indexed",
}


def open_index(kind: str, shards: Sequence[str], scan: Callable[[str], Scan]) -> ShardIndex:
    """The index of these shards, as they are now, from the cache folder; made if there is none.

    A killed one resumes where it stopped. That of shards that have changed since is no longer used.

    Args:
      kind: tar or arrayrecord.
      shards: path or URL of each.
      scan: reads one; raises nothing that is about the shard.

    Raises:
      ValueError: no shard can be read.
    """
    stamped = stamps(shards)
    key = keys.digest({"version": _VERSION, "kind": kind, "shards": shards, "stamps": stamped})
    folder = cache_folder() / "index" / key
    parts = folder.with_name(f"{key}.parts")
    if not folder.exists():
        parts.parent.mkdir(parents=True, exist_ok=True)
        with _alone(parts.with_suffix(".lock")):
            if not folder.exists():
                parts.mkdir(exist_ok=True)
                _scan_all(shards, scan, parts)
                try:
                    _join(kind, shards, stamped, parts, folder)
                finally:
                    shutil.rmtree(parts)
    return ShardIndex(folder)


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
    """One process at a time does what is in the block; a killed one does not keep the others out."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _scan_all(shards: Sequence[str], scan: Callable[[str], Scan], parts: pathlib.Path) -> None:
    waiting = [(i, shard) for i, shard in enumerate(shards) if not _part(parts, i).exists()]
    # Reading headers is work for the processor when the shards are local, and waiting when they are not.
    busy = len(waiting) > _MANY_SHARDS and not any("://" in shard for _, shard in waiting)
    workers = min(os.cpu_count() or 1, 64) if busy else 16
    pool: concurrent.futures.Executor = (
        concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        if busy
        else concurrent.futures.ThreadPoolExecutor(workers)
    )
    with pool:
        found = [pool.submit(_write_part, scan, shard, _part(parts, i)) for i, shard in waiting]
        done = len(shards) - len(waiting)
        hidden = not sys.stderr.isatty()
        with tqdm.tqdm(total=len(shards), initial=done, desc="index", unit="shard", disable=hidden) as bar:
            try:
                for each in concurrent.futures.as_completed(found):
                    each.result()
                    bar.update()
            except BaseException:
                # A missing shard is told, and Ctrl-C obeyed, before a hundred thousand others are read.
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _part(parts: pathlib.Path, shard: int) -> pathlib.Path:
    return parts / str(shard)


def _write_part(scan: Callable[[str], Scan], shard: str, path: pathlib.Path) -> None:
    size, samples, fault, rows, passed = scan(shard)
    if passed:
        write_atomic(path.with_suffix(".json"), json.dumps(vars(passed)))
    write_atomic(path, _PART.pack(fault, size, samples) + (b"" if rows is None else rows.tobytes()))


def _join(kind: str, shards: Sequence[str], stamped: Sequence[str], parts: pathlib.Path, folder: pathlib.Path) -> None:
    count = len(shards)
    starts, sizes, faults = np.zeros(count + 1, np.int64), np.zeros(count, np.int64), np.zeros(count, np.uint8)
    passed = PassedOver()
    with atomic_folder(folder) as building:
        with open(building / "samples.bin", "wb") as file:
            for i in range(count):
                data = _part(parts, i).read_bytes()
                faults[i], sizes[i], samples = _PART.unpack_from(data)
                starts[i + 1] = starts[i] + samples
                file.write(data[_PART.size :])
                if (about := _part(parts, i).with_suffix(".json")).exists():
                    passed.update(**json.loads(about.read_text()))
        if (faults == FAULTS.index("unreadable")).all():
            raise ValueError(f"{shards[0]}: none of {count} shards can be read")
        if kind != "tar":
            (building / "samples.bin").unlink()
        _write_rest(pathlib.Path(building), kind, shards, stamped, starts, sizes, faults, passed)


def _write_rest(
    folder: pathlib.Path,
    kind: str,
    shards: Sequence[str],
    stamped: Sequence[str],
    starts: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    faults: npt.NDArray[np.uint8],
    passed: PassedOver,
) -> None:
    for name, lines in (("shards", shards), ("stamps", stamped)):
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    for name, array in (("starts", starts), ("sizes", sizes), ("faults", faults)):
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    about: dict[str, Any] = {"version": _VERSION, "kind": kind, "samples": int(starts[-1]), "shards": len(shards)}
    about["passed_over"] = vars(passed)
    write_atomic(folder / "index.json", json.dumps(about, indent=2) + "\n")


def write_sparse_index(folder: pathlib.Path, *, shards: int = 100_000, samples: int = 10_000) -> None:
    """An index of `shards` tars of `samples` each that do not exist; it takes no room on disk for the samples.

    What is read of it are samples without an image. `Tars(ShardIndex(folder))` is the source.
    """
    folder.mkdir(parents=True)
    names = [f"/nowhere/{i:06}.tar" for i in range(shards)]
    with open(folder / "samples.bin", "wb") as file:
        file.truncate(shards * samples * SAMPLE.itemsize)
    starts = np.arange(shards + 1, dtype=np.int64) * samples
    absent, nothing = ["missing"] * shards, PassedOver()
    _write_rest(folder, "tar", names, absent, starts, np.zeros(shards, np.int64), np.zeros(shards, np.uint8), nothing)
