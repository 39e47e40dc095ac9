"""The index of a sharded data set: the number of samples in each shard and their positions, in a local folder.

An index is keyed by the names and stamps (`content.stamps`) of its shards, made once, and read in place: a billion
samples start as fast as a thousand. The folder contains:

    index.json    {"version": 3, "kind": "tar" or "arrayrecord", "samples": N, "shards": S,
                  "passed_over": {"kinds": {suffix or description: files}, "first": name}}
    shards.txt    S lines: the path or URL of each shard
    stamps.txt    S lines: the stamp of each shard
    starts.npy    (S + 1,) int64: the index of the first sample of each shard, and N
    sizes.npy     (S,) int64: bytes of each shard when it was indexed; −1 for a shard that could not be read
    faults.npy    (S,) uint8: the shard's fault, an index in FAULTS; its last sample then stands for the lost ones
    samples.bin   N rows of SAMPLE, 32 bytes each; only for tars
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import multiprocessing
import os
import pathlib
import shutil
import struct
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tqdm

from tclip_jax import keys
from tclip_jax.data.files import SkippedFiles
from tclip_jax.data.sources.base import FAULTS, BadSample
from tclip_jax.data.sources.content import combined, contents, exclusive, stamps
from tclip_jax.data.sources.remote import is_remote
from tclip_jax.schema import plain
from tclip_jax.storage import atomic_folder, cache_folder, write_atomic

# The position of a sample in its tar: `start` is the first byte of its first header; `image` and `text` are relative.
SAMPLE = np.dtype(
    [
        ("start", "<i8"),
        ("image", "<u4"),
        ("image_size", "<u4"),  # 0: no image
        ("text", "<u4"),
        ("text_size", "<u4"),  # 0: no text
        ("fault", "u1"),
        ("unused", "V7"),
    ]
)

_VERSION = 3
_PART = struct.Struct("<Bqq")  # before the rows of one shard: its fault, its size and its number of samples
_MANY_SHARDS = 64  # above this number, local shards are scanned by processes
_LOST = {
    "broken_shard": "the shard is damaged: the samples from here on are lost",
    "empty_shard": "the shard has no samples",
    "unreadable": "the shard could not be read when it was indexed",
}


class Scan(NamedTuple):
    """The scan of one shard.

    Attributes:
      size: bytes of the shard; −1 if it could not be read.
      samples: number of samples, including one for a fault.
      fault: the shard's fault, an index in FAULTS; 0 for none.
      rows: (samples,) SAMPLE for tars, else None.
      skipped: files of a tar that belong to no sample.
    """

    size: int
    samples: int
    fault: int = 0
    rows: npt.NDArray[np.void] | None = None
    skipped: SkippedFiles | None = None


class ShardIndex:
    """An open index folder.

    Attributes:
      folder: the folder.
      shards: path or URL of each shard.
      stamps: stamp of each shard (`content.stamps`).
      sizes: (S,) int64, bytes of each shard.
      notes: a line about the files that were skipped in the shards, if any.

    Raises:
      ValueError: the folder is not a complete index of this version.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        try:
            manifest = json.loads((folder / "index.json").read_text())
            version, samples = manifest["version"], manifest["samples"]
            skipped = str(SkippedFiles(**manifest["passed_over"]))
            self.shards, self.stamps = (
                (folder / f"{name}.txt").read_text().split("\n")[:-1] for name in ("shards", "stamps")
            )
            # Mapped and then copied: NumPy refuses a header that claims more bytes than the file has.
            self._starts, self.sizes, self._faults = (
                np.array(np.load(folder / f"{name}.npy", "r", allow_pickle=False))
                for name in ("starts", "sizes", "faults")
            )
            rows = folder / "samples.bin"
            valid = rows.stat().st_size == samples * SAMPLE.itemsize if rows.exists() else manifest["kind"] != "tar"
        # NumPy parses headers with Python's tokenizer, which raises many types for a damaged one.
        except Exception as error:
            reason = plain(error, 200)
            raise ValueError(f"{folder}: not a complete index; delete the folder to make it again ({reason})") from None
        count = len(self.shards)
        arrays = [(array.shape, array.dtype) for array in (self._starts, self.sizes, self._faults)]
        valid = valid and type(samples) is int and version == _VERSION and len(self.stamps) == count
        valid = valid and arrays == [((count + 1,), np.int64), ((count,), np.int64), ((count,), np.uint8)]
        valid = valid and (np.diff(self._starts) >= 0).all() and (self._faults < len(FAULTS)).all()
        if not valid or (self._starts[0], self._starts[-1]) != (0, samples):
            raise ValueError(
                f"{folder}: not a complete index of version {_VERSION}; delete the folder to make it again"
            )
        self._samples = int(samples)
        shards = self.shards[0] + (f" and {count - 1:,} more" if count > 1 else "")
        self.notes = [f"{shards}: {skipped}"] if skipped else []

    def __len__(self) -> int:
        return self._samples

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardIndex, (self.folder,)

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the contents of the shards in their order."""
        return combined(contents(self.shards, total=len(self.shards)))

    def locate(self, index: int) -> tuple[int, int]:
        """Return the shard of a sample, and the sample's index in that shard.

        Raises:
          BadSample: the sample stands for the lost samples of a damaged shard.
        """
        if not 0 <= index < self._samples:
            raise IndexError(f"sample {index} of {self._samples}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        if self._faults[shard] and index == self._starts[shard + 1] - 1:
            kind: Any = FAULTS[self._faults[shard]]
            raise BadSample(kind, self.shards[shard], _LOST.get(kind, "the rest of the shard is lost"))
        return shard, index - int(self._starts[shard])

    def sample(self, index: int) -> np.void:
        """Read the SAMPLE of a sample in tars."""
        # Not a memory map: all its pages would in time count as this process's memory.
        data = os.pread(self._descriptor, SAMPLE.itemsize, index * SAMPLE.itemsize)
        return np.frombuffer(data, SAMPLE)[0]

    @functools.cached_property
    def _descriptor(self) -> int:
        descriptor = os.open(self.folder / "samples.bin", os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor


def open_index(kind: str, shards: Sequence[str], scan: Callable[[str], Scan]) -> ShardIndex:
    """Open the index of shards in the cache folder, or make it.

    Interrupted indexing resumes. If a shard has changed, a new index is made.

    Args:
      kind: "tar" or "arrayrecord".
      shards: path or URL of each shard.
      scan: scans one shard. It returns a fault for a damaged shard; an exception stops the indexing.

    Raises:
      ValueError: no shard can be read.
    """
    stamped = stamps(shards)
    key = keys.digest({"version": _VERSION, "kind": kind, "shards": shards, "stamps": stamped})
    folder = cache_folder() / "index" / key
    parts = folder.with_name(f"{key}.parts")
    if not folder.exists():
        parts.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(parts.with_suffix(".lock")):
            if not folder.exists():
                parts.mkdir(exist_ok=True)
                _scan_all(shards, scan, parts)
                try:
                    _join(kind, shards, stamped, parts, folder)
                finally:
                    shutil.rmtree(parts)
    return ShardIndex(folder)


def _scan_all(shards: Sequence[str], scan: Callable[[str], Scan], parts: pathlib.Path) -> None:
    missing = [(i, shard) for i, shard in enumerate(shards) if not _part(parts, i).exists()]
    # Scans of local shards are bound by the processor, those of remote shards by the network.
    use_processes = len(missing) > _MANY_SHARDS and not any(is_remote(shard) for _, shard in missing)
    workers = min(os.cpu_count() or 1, 64) if use_processes else 16
    pool: concurrent.futures.Executor = (
        concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        if use_processes
        else concurrent.futures.ThreadPoolExecutor(workers)
    )
    with pool:
        scans = [pool.submit(_write_part, scan, shard, _part(parts, i)) for i, shard in missing]
        done = len(shards) - len(missing)
        hidden = not sys.stderr.isatty()
        with tqdm.tqdm(total=len(shards), initial=done, desc="index", unit="shard", disable=hidden) as bar:
            try:
                for future in concurrent.futures.as_completed(scans):
                    future.result()
                    bar.update()
            except BaseException:
                # A missing shard or Ctrl-C ends the indexing at once, not after all other shards.
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _part(parts: pathlib.Path, shard: int) -> pathlib.Path:
    return parts / str(shard)


def _write_part(scan: Callable[[str], Scan], shard: str, path: pathlib.Path) -> None:
    size, samples, fault, rows, skipped = scan(shard)
    if skipped:
        write_atomic(path.with_suffix(".json"), json.dumps(vars(skipped)))
    write_atomic(path, _PART.pack(fault, size, samples) + (b"" if rows is None else rows.tobytes()))


def _join(kind: str, shards: Sequence[str], stamped: Sequence[str], parts: pathlib.Path, folder: pathlib.Path) -> None:
    count = len(shards)
    starts, sizes, faults = np.zeros(count + 1, np.int64), np.zeros(count, np.int64), np.zeros(count, np.uint8)
    skipped = SkippedFiles()
    with atomic_folder(folder) as building:
        with open(building / "samples.bin", "wb") as file:
            for i in range(count):
                data = _part(parts, i).read_bytes()
                faults[i], sizes[i], samples = _PART.unpack_from(data)
                starts[i + 1] = starts[i] + samples
                file.write(data[_PART.size :])
                if (part_skipped := _part(parts, i).with_suffix(".json")).exists():
                    skipped.update(**json.loads(part_skipped.read_text()))
        if (faults == FAULTS.index("unreadable")).all():
            raise ValueError(f"{shards[0]}: none of {count} shards can be read")
        if kind != "tar":
            (building / "samples.bin").unlink()
        _write_rest(pathlib.Path(building), kind, shards, stamped, starts, sizes, faults, skipped)


def _write_rest(
    folder: pathlib.Path,
    kind: str,
    shards: Sequence[str],
    stamped: Sequence[str],
    starts: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    faults: npt.NDArray[np.uint8],
    skipped: SkippedFiles,
) -> None:
    """Write all files of an index except samples.bin."""
    for name, lines in (("shards", shards), ("stamps", stamped)):
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    for name, array in (("starts", starts), ("sizes", sizes), ("faults", faults)):
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    manifest: dict[str, Any] = {"version": _VERSION, "kind": kind, "samples": int(starts[-1]), "shards": len(shards)}
    manifest["passed_over"] = vars(skipped)
    write_atomic(folder / "index.json", json.dumps(manifest, indent=2) + "\n")


def write_sparse_index(folder: pathlib.Path, *, shards: int = 100_000, samples: int = 10_000) -> None:
    """Write an index of tars that do not exist, to measure the cost of large indexes.

    samples.bin is a sparse file of zeros, so no sample has an image. `Tars(ShardIndex(folder))` is the source.

    Args:
      folder: the new folder.
      shards: number of tars.
      samples: number of samples in each tar.
    """
    folder.mkdir(parents=True)
    names = [f"/nowhere/{i:06}.tar" for i in range(shards)]
    with open(folder / "samples.bin", "wb") as file:
        file.truncate(shards * samples * SAMPLE.itemsize)
    starts = np.arange(shards + 1, dtype=np.int64) * samples
    sizes, faults = np.zeros(shards, np.int64), np.zeros(shards, np.uint8)
    _write_rest(folder, "tar", names, ["missing"] * shards, starts, sizes, faults, SkippedFiles())
