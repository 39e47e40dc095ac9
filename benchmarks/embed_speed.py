"""Pictures per second of `tclip embed`, decoding and resizing included, against open_clip in PyTorch bfloat16.

Part of `python -m benchmarks.runtimes --embed`, which starts the other side in a new process:

python -m benchmarks.embed_speed FOLDER PICTURES OUT.npy
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.peers import ARTIFACT, Task, least_cosine, model_config, torch_tower

BATCH, WORKERS = 64, 2
PHOTOS = 64  # different ones, of 500 x 375; more pictures repeat them
THEIRS = "open_clip bfloat16"
SIDES = ("tclip embed A8", "tclip embed A16", THEIRS)


def write_pictures(folder: pathlib.Path, pictures: int, photos: int) -> None:
    """Write JPEGs that decode as slowly as real photos; `photos` of them differ."""
    from benchmarks.data import photo

    rng = np.random.default_rng(0)
    pool = [photo(rng) for _ in range(photos)]
    folder.mkdir()
    for i in range(pictures):
        (folder / f"{i:06}.jpg").write_bytes(pool[i % photos])


def embed_speed(folder: pathlib.Path, run_apart: Callable[..., str], rounds: int, quick: bool) -> dict[str, Any]:
    """Return seconds and pictures per second of all sides, which take turns, each time in new processes.

    A run of one batch costs as much for imports, loading, compiling and the first workers as a run of many. So the
    difference of two runs, of one batch and of all pictures, is the time of the pictures between. A figure is None
    where other load hides that difference.

    Args:
      folder: what `benchmarks.peer_files` wrote.
      run_apart: function that runs a module with arguments in a new process.
      rounds: measurements of each run; the least counts.
      quick: embed few pictures.

    Raises:
      RuntimeError: a process failed.
      ValueError: the two sides' embeddings differ.
    """
    counts = (BATCH, 3 * BATCH if quick else 6 * BATCH)
    for pictures in counts:
        write_pictures(folder / str(pictures), pictures, 4 if quick else PHOTOS)
    seconds: dict[str, list[tuple[float, ...]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            seconds[side].append(tuple(_embed_once(folder, side, pictures, run_apart) for pictures in counts))
    theirs = np.load(_out(folder, THEIRS, counts[-1]))
    cosines = {side: least_cosine(np.load(_out(folder, side, counts[-1])), theirs) for side in SIDES[:-1]}
    if min(cosines.values()) < 0.99:
        raise ValueError(f"embeddings of a picture have the cosine {min(cosines.values()):.4f}: the sides must agree")
    speeds = {side: _pictures_per_second(counts, seconds[side]) for side in SIDES}
    neighbours = [
        {side: _pictures_per_second(counts, [seconds[side][each]]) for side in SIDES} for each in range(rounds)
    ]
    return {
        "pictures": counts[1],
        "least_cosine": cosines,
        "pictures_per_second": speeds,
        "seconds_of_one_batch": {side: min(first for first, _ in seconds[side]) for side in SIDES},
        "ratio": {side: _speedup(speeds[side], speeds[THEIRS]) for side in cosines},
        "round_ratios": {side: [_speedup(each[side], each[THEIRS]) for each in neighbours] for side in cosines},
    }


def _pictures_per_second(counts: tuple[int, int], seconds: Sequence[tuple[float, ...]]) -> float | None:
    """Return the speed by the least times of both runs; None if other load hides the time of the pictures."""
    few, many = (min(column) for column in zip(*seconds, strict=True))
    return (counts[1] - counts[0]) / (many - few) if many > few else None


def _speedup(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours and theirs else None


def _out(folder: pathlib.Path, side: str, pictures: int) -> pathlib.Path:
    return folder / f"{side.replace(' ', '-')}-{pictures}.npy"


def _embed_once(folder: pathlib.Path, side: str, pictures: int, run_apart: Callable[..., str]) -> float:
    """Return the seconds of a new process that embeds the folder of so many pictures."""
    images, out = folder / str(pictures), _out(folder, side, pictures)
    start = time.perf_counter()
    if side == THEIRS:
        run_apart("benchmarks.embed_speed", folder, images, out)
    else:
        options = ("--activations", side.split()[-1], "--out", out, "--overwrite")
        run_apart("tclip_jax", "embed", folder / ARTIFACT, "--images", images, *options)
    return time.perf_counter() - start


def embed_text(speed: dict[str, Any]) -> str:
    """Return the result of `embed_speed` as lines."""
    lines = [f"{speed['pictures']} JPEGs of 500 x 375, decoded, resized and encoded in batches of {BATCH}"]
    for side in SIDES:
        lines.append(
            f"{side:20}{_shown(speed['pictures_per_second'][side]):>6} pictures/s after the first batch, "
            f"which takes {speed['seconds_of_one_batch'][side]:.1f} s with start and load"
        )
    for side, ratio in speed["ratio"].items():
        rounds = ", ".join(map(_shown, speed["round_ratios"][side]))
        cosine = speed["least_cosine"][side]
        lines.append(f"{side} is {_shown(ratio)} times as fast (rounds: {rounds}); least cosine of both {cosine:.5f}")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"


class Pictures:
    """Image files as a data set for PyTorch's DataLoader: normalised pixels (3, H, W) of each."""

    def __init__(self, paths: Sequence[pathlib.Path], transform: Callable[[Any], Any]) -> None:
        self._paths, self._transform = paths, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        with Image.open(self._paths[index]) as image:
            return self._transform(image)


def embed_with_open_clip(folder: pathlib.Path, pictures: pathlib.Path, out: pathlib.Path) -> None:
    """Encode the pictures of a folder in bfloat16, decoded by two workers, and write float32 embeddings as .npy."""
    from tclip_jax.numerics.torch_side import import_torch

    torch, task = import_torch(), dataclasses.replace(Task.read(folder), tower="image")
    torch.set_num_threads(task.threads)
    import open_clip

    tower = torch_tower(folder, task).bfloat16()
    transform = open_clip.image_transform(model_config(task.model).vision.image_size, is_train=False)
    files = Pictures(sorted(pictures.iterdir()), transform)
    loader = torch.utils.data.DataLoader(files, batch_size=BATCH, num_workers=WORKERS)
    with torch.inference_mode():
        np.save(out, np.concatenate([tower(batch.bfloat16()).float().numpy() for batch in loader]))


if __name__ == "__main__":
    embed_with_open_clip(*map(pathlib.Path, sys.argv[1:]))
