"""Memory and time of retrieval recall: `python -m benchmarks.retrieval [--quick] [--json]`.

Peak resident memory of a process that holds N x 512 float32 image embeddings and M caption embeddings, for two M at
the full N: what it takes beyond the embeddings does not grow with M, so it is that of any M. Then the time against
NumPy with the whole matrix of scores, runs of both in turn. All million captions of a million images would be 1e15
operations, hours on a CPU: the full run ranks as many as fit in minutes. Exit code 1 over 4 GiB.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from tclip_jax.evaluation.retrieval import retrieval_ranks
from tclip_jax.schema import count

WIDTH = 512
BUDGET_GIB = 4.0


def unit_rows(rows: int, seed: int) -> npt.NDArray[np.float32]:
    """Random unit vectors, made in place: no second copy shows in the peak."""
    out = np.empty((rows, WIDTH), np.float32)
    rng = np.random.default_rng(seed)
    for start in range(0, rows, 65_536):
        part = out[start : start + 65_536]
        rng.standard_normal(part.shape, np.float32, part)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return out


def embeddings(images: int, captions: int) -> tuple[Any, Any, Any]:
    """Images, and captions that are near theirs."""
    image, text = unit_rows(images, 0), unit_rows(captions, 1)
    owners = np.random.default_rng(2).integers(0, images, captions)
    text += 0.2 * image[owners]
    return image, text / np.linalg.norm(text, axis=1, keepdims=True), owners


def measure(images: int, captions: int) -> dict[str, float]:
    """One case in this process: seconds of ranking, peak and embeddings in GiB, recall@10 as a check."""
    arguments = embeddings(images, captions)
    before = time.perf_counter()
    ranks = retrieval_ranks(*arguments)
    return {
        "images": images,
        "captions": captions,
        "seconds": time.perf_counter() - before,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "embeddings_gib": (images + captions) * WIDTH * 4 / 2**30,
        "image_recall@10": float(np.mean(ranks.image < 10)),
    }


def in_a_process(images: int, captions: int) -> dict[str, float]:
    """The same in a fresh process, whose peak is of nothing else."""
    command = [sys.executable, "-m", "benchmarks.retrieval", "--case", str(images), str(captions)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def against_numpy(images: int, captions: int, repeats: int) -> float:
    """Time of NumPy over ours: its scores as one matrix, and the rank of each caption's and each image's own."""
    image, text, owners = embeddings(images, captions)

    def whole() -> None:
        scores = text @ image.T
        own = scores[np.arange(captions), owners]
        np.sum(scores > own[:, None], axis=1)
        best = np.full(images, np.inf, np.float32)
        np.minimum.at(best, owners, own)
        np.sum(scores > best, axis=0)

    times: dict[str, list[float]] = {"ours": [], "numpy": []}
    retrieval_ranks(image[:1], text[:1], [0])  # compiles
    for _ in range(repeats):
        for name, run in (("ours", lambda: retrieval_ranks(image, text, owners)), ("numpy", whole)):
            before = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - before)
    return statistics.median(times["numpy"]) / statistics.median(times["ours"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50,000 images instead of 1,000,000; under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object last")
    parser.add_argument("--case", nargs=2, type=count, metavar=("IMAGES", "CAPTIONS"), help="one case, in this process")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(*args.case)))
        return 0
    images, captions = (50_000 if args.quick else 1_000_000), 2048
    cases = [in_a_process(images, captions), in_a_process(images, 2 * captions)]
    print(f"{'images':>10} {'captions':>9} {'seconds':>8} {'peak GiB':>9} {'beyond embeddings':>18}")
    for case in cases:
        print(
            f"{case['images']:>10,} {case['captions']:>9,} {case['seconds']:>8.1f} {case['peak_gib']:>9.2f}"
            f" {case['peak_gib'] - case['embeddings_gib']:>18.2f}"
        )
    ratio = against_numpy(20_000, 4096, 3 if args.quick else 7)
    print(f"20,000 x 4,096: {ratio:.2f} times as fast as NumPy with the whole matrix (median)")
    passed = max(case["peak_gib"] for case in cases) <= BUDGET_GIB
    print(f"peak {'within' if passed else 'OVER'} {BUDGET_GIB:g} GiB")
    if args.json:
        print(json.dumps({"cases": cases, "times_as_fast_as_numpy": ratio, "passed": passed}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
