"""The input pipeline: speed against open_clip's loader, waiting time, memory, and the time to start and restart.

python -m benchmarks.data            about fifteen minutes
python -m benchmarks.data --quick    under a minute: fewer samples and rounds, no training step
python -m benchmarks.data --quick --json | tail -1

The photos are synthetic: 500 x 375 JPEGs of quality 90 and about 115 kB. Their luma and chroma are noise with the 1/f
spectrum of natural images, so that they decode as slowly as real photos. Both loaders read the same tars with two
worker processes, and make random crops of 224 x 224 and 77 tokens. They take turns, each in a new process. open_clip's
loader returns normalised floats; ours returns bytes, which the step normalises on the device. Exits with 1 if a figure
misses its goal, and always with 0 under --quick, which is too short to measure speed.

Needs the extra `torch`, and for open_clip's loader `pip install pandas 'webdataset==0.2.86'`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import io
import json
import logging
import math
import multiprocessing
import os
import pathlib
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from tclip_jax.data.images import Preprocess
from tclip_jax.data.pipeline import train_iterator
from tclip_jax.data.sources.shard_index import ShardIndex, write_sparse_index
from tclip_jax.data.sources.tars import Tars
from tclip_jax.data.tokenizer import Tokenizer
from tclip_jax.datasets.bench import measure, process_memory, process_seconds
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import model_cfg
from tclip_jax.runs.config import RunConfig, base_config, run_config
from tclip_jax.training.input import train_data

WIDTH, HEIGHT, QUALITY = 500, 375, 90
WORKERS = 2
BATCH = 32
WORDS = (
    "a",
    "photo",
    "of",
    "the",
    "small",
    "brown",
    "dog",
    "running",
    "over",
    "wet",
    "grass",
    "near",
    "an",
    "old",
    "bridge",
)

Figures = dict[str, Any]


def photo(rng: np.random.Generator, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """Return a JPEG of noise with the spectrum of natural images: amplitude ~ 1/frequency (Field, JOSA A 4, 1987)."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    frequency[0, 0] = 1

    def field() -> np.ndarray:
        noise = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
        pixels = np.fft.irfft2(noise / frequency**1.1, s=(height, width))
        return (pixels - pixels.mean()) / pixels.std()

    planes = [128 + 52 * field(), 128 + 18 * field(), 128 + 18 * field()]
    ycbcr = np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(ycbcr, "YCbCr").convert("RGB").save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def write_tars(folder: pathlib.Path, shards: int, samples: int, photos: int = 64) -> str:
    """Write tars in the format of img2dataset, sampled from `photos` photos; return their pattern."""
    rng = np.random.default_rng(0)
    pool = [photo(rng) for _ in range(photos)]
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for sample in range(samples):
                key = f"{shard:05}{sample:04}"
                caption = " ".join(rng.choice(WORDS, rng.integers(5, 20))).encode()
                about = json.dumps({"caption": caption.decode(), "key": key, "status": "success"}).encode()
                members = {"jpg": pool[rng.integers(photos)], "txt": caption, "json": about}
                for suffix, data in members.items():
                    entry = tarfile.TarInfo(f"{key}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return f"{folder}/{{00000..{shards - 1:05}}}.tar"


def run_of(pattern: str, batch_size: int = BATCH, workers: int = WORKERS) -> RunConfig:
    """Return the configuration of ViT-B/16 on the tars."""
    config = base_config()
    config.model = model_cfg("ViT-B-16")
    config.data.update({"source": f"wds:{pattern}", "templates": "none", "augment": "random_resized_crop"})
    config.data.update({"batch_size": batch_size, "workers": workers})
    return run_config(config)


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function in a new process and return its result."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def open_clip_speed(pattern: str, seconds: float) -> tuple[float, float]:
    """Return images per second and per core-second of open_clip's loader, after its shuffle buffer is full."""
    from tclip_jax.numerics.torch_side import import_torch

    import_torch().set_num_threads(1)
    import open_clip
    from open_clip_train.data import get_wds_dataset

    # open_clip forks its workers on Linux. This process was spawned, and would spawn them by default.
    multiprocessing.set_start_method("fork", force=True)
    args = argparse.Namespace(
        train_data=pattern,
        train_num_samples=10**9,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        batch_size=BATCH,
        workers=WORKERS,
        world_size=1,
        seed=0,
    )
    transform = open_clip.image_transform(224, is_train=True)
    info = get_wds_dataset(args, transform, is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-16"))
    batches = iter(info.dataloader)
    # Discard the batches that the workers prepared before the measurement.
    for _ in range(4 * WORKERS):
        next(batches)
    images, started, worked = 0, time.perf_counter(), process_seconds(os.getpid())
    while (spent := time.perf_counter() - started) < seconds:
        images += len(next(batches)[0])
    return images / spent, images / (process_seconds(os.getpid()) - worked)


def speed(pattern: str, rounds: int, seconds: float) -> Figures:
    """Return images per second of both loaders, which take turns, and the medians of their ratios.

    On a machine with other load, use the ratio of images per core-second.
    """
    ours, theirs = [], []
    for _ in range(rounds):
        measured = measure(run_of(pattern), WORKERS, seconds=seconds, step_seconds=0)
        ours.append((measured.images_per_second, measured.images_per_core_second or math.nan))
        theirs.append(alone(open_clip_speed, pattern, seconds))
    ratios = [(a[0] / b[0], a[1] / b[1]) for a, b in zip(ours, theirs, strict=True)]
    names = ("images_per_second", "images_per_core_second")
    return {
        **{name: statistics.median(each[i] for each in ours) for i, name in enumerate(names)},
        **{f"open_clip_{name}": statistics.median(each[i] for each in theirs) for i, name in enumerate(names)},
        "speed_ratio": statistics.median(ratio for ratio, _ in ratios),
        "core_speed_ratio": statistics.median(ratio for _, ratio in ratios),
    }


def wait_share(pattern: str, steps: int) -> Figures:
    """Return the fraction of time that ternary ViT-B/16 training waits for data, with eight images per step."""
    from benchmarks.train_step import jax_steps
    from tclip_jax.models.ternary_rules import ternary_rules
    from tclip_jax.ternary import Quantizer

    step, _ = jax_steps(CLIPConfig.from_open_clip(model_cfg("ViT-B-16")), 8, ternary_rules("Q-ALL", Quantizer()))
    data = train_data(run_of(pattern, batch_size=8, workers=0))
    step()
    waited, started = 0.0, time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        next(data)
        waited += time.perf_counter() - before
        step()
    spent = time.perf_counter() - started
    return {"wait_share": waited / spent, "step_seconds": (spent - waited) / steps}


def memory(pattern: str, samples: int) -> Figures:
    """Return the largest deviation of the memory of all processes from its median, over the last 90 % of `samples`."""
    data, count = train_data(run_of(pattern)), 0
    sizes: list[int] = []
    step = samples // 50
    while count < samples:
        count += len(next(data)["weight"])
        if count >= samples // 10 + step * len(sizes):
            sizes.append(process_memory(os.getpid()) or 0)
    data.close()
    median = statistics.median(sizes)
    return {"memory_gib": median / 2**30, "memory_drift": max(abs(size / median - 1) for size in sizes)}


def first_batch(pattern: str, started: float) -> float:
    """Return the seconds from `started`, before this process existed, to the first batch."""
    next(train_data(run_of(pattern, workers=0)))
    return time.time() - started


def start(folder: pathlib.Path) -> Figures:
    """Return the seconds to the first batch of 1,000 shards, without and with a cached index."""
    pattern = write_tars(folder, 1, 10, photos=2)
    for shard in range(1, 1000):
        os.link(folder / "00000.tar", folder / f"{shard:05}.tar")
    pattern = pattern.replace("00000.tar", "00999.tar").replace("00000..00000", "00000..00999")
    first, cached = (alone(first_batch, pattern, time.time()) for _ in range(2))
    return {"first_batch_seconds_indexing": first, "first_batch_seconds": cached}


def billion(folder: pathlib.Path, started: float) -> Figures:
    """Return seconds and memory to the first batch of 10⁹ pairs in 100,000 shards, of which only the index exists."""
    logging.disable(logging.WARNING)  # hides the warning that no sample has an image
    data = train_iterator(
        Tars(ShardIndex(folder)),
        tokenizer=Tokenizer(),
        preprocess=Preprocess(224),
        augment="random_resized_crop",
        templates="none",
        batch_size=BATCH,
        seed=0,
    )
    next(data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"billion_seconds": time.time() - started, "billion_gib": peak / 2**30}


def restart(pattern: str) -> Figures:
    """Return whether the batches after a restart equal those of an uninterrupted iterator, byte for byte."""
    data = train_data(run_of(pattern))
    for _ in range(3):
        next(data)
    state = data.get_state()
    expected = [next(data) for _ in range(3)]
    data.close()
    again = train_data(run_of(pattern))
    again.set_state(state)
    same = all(
        batch[key].tobytes() == value.tobytes()
        for batch, reference in zip(again, expected, strict=False)
        for key, value in reference.items()
    )
    again.close()
    return {"restart_identical": same}


# figure -> (goal, kind of bound)
GOALS: dict[str, tuple[float, str]] = {
    "speed_ratio": (1.5, "at least"),
    "core_speed_ratio": (1.5, "at least"),
    "wait_share": (0.05, "at most"),
    "memory_drift": (0.05, "at most"),
    "first_batch_seconds": (10, "at most"),
    "billion_seconds": (30, "at most"),
    "billion_gib": (2, "at most"),
    "restart_identical": (True, "at least"),
}


def main() -> int:
    """Print every figure next to its goal, and with --json one object last."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples and rounds; under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument(
        "--only", nargs="+", metavar="PART", help="run only these parts: speed, wait, memory, start, billion, restart"
    )
    args = parser.parse_args()
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        os.environ["TCLIP_CACHE_DIR"] = str(folder / "cache")
        pattern = write_tars(folder / "photos", *((8, 150) if args.quick else (20, 250)))
        write_sparse_index(folder / "sparse")
        parts: dict[str, Callable[[], Figures]] = {
            "speed": lambda: speed(pattern, *((1, 3.0) if args.quick else (7, 8.0))),
            "wait": lambda: {} if args.quick else alone(wait_share, pattern, 20),
            "memory": lambda: alone(memory, pattern, 1000 if args.quick else 50_000),
            "start": lambda: start(folder / "thousand"),
            "billion": lambda: alone(billion, folder / "sparse", time.time()),
            "restart": lambda: restart(pattern),
        }
        for name, part in parts.items():
            if args.only and name not in args.only:
                continue
            for key, value in part().items():
                figures[key] = value
                print(f"{key:32}{_shown(value):>12}  {_verdict(key, value)}", flush=True)
    failed = [key for key, value in figures.items() if _verdict(key, value).endswith("MISSED")]
    if args.json:
        print(json.dumps({"cores": len(os.sched_getaffinity(0)), **figures, "missed": failed}))
    return 1 if failed and not args.quick else 0


def _shown(value: float | bool) -> str:
    return str(value) if isinstance(value, bool) else f"{value:,.3f}"


def _verdict(key: str, value: float) -> str:
    if key not in GOALS:
        return ""
    goal, kind = GOALS[key]
    reached = value >= goal if kind == "at least" else value <= goal
    return f"goal {kind} {goal}{'' if reached else '  MISSED'}"


if __name__ == "__main__":
    sys.exit(main())
