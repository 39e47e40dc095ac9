"""Memory and time of retrieval recall: `python -m benchmarks.retrieval [--quick] [--json]`.

Measures the peak resident memory of a process with N x 512 float32 image embeddings and M caption embeddings, for two
values of M. Memory beyond the embeddings does not grow with M. Then measures the time against NumPy with the whole
matrix of scores; both take turns. A million captions of a million images would need 1e15 operations, hours on a CPU, so
the full run ranks only as many captions as fit in minutes. Exits with 1 if the peak is over 4 GiB.
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
    """Return random unit vectors, computed in place so that no second copy adds to the peak."""
    out = np.empty((rows, WIDTH), np.float32)
    rng = np.random.default_rng(seed)
    for start in range(0, rows, 65_536):
        part = out[start : start + 65_536]
        rng.standard_normal(part.shape, np.float32, part)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return out


def embeddings(images: int, captions: int) -> tuple[Any, Any, Any]:
    """Return image embeddings, caption embeddings near those of their images, and the image of each caption."""
    image, text = unit_rows(images, 0), unit_rows(captions, 1)
    owners = np.random.default_rng(2).integers(0, images, captions)
    text += 0.2 * image[owners]
    return image, text / np.linalg.norm(text, axis=1, keepdims=True), owners


def measure(images: int, captions: int) -> dict[str, float]:
    """Measure one case in this process: seconds, GiB of the peak and of the embeddings, and recall@10 as a check."""
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
    """Measure one case in a new process, so that the peak contains nothing else."""
    command = [sys.executable, "-m", "benchmarks.retrieval", "--case", str(images), str(captions)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def against_numpy(images: int, captions: int, repeats: int) -> float:
    """Return the time of NumPy over ours. NumPy computes all scores as one matrix, then both ranks."""
    image, text, owners = embeddings(images, captions)

    def whole() -> None:
        scores = text @ image.T
        positives = scores[np.arange(captions), owners]
        np.sum(scores > positives[:, None], axis=1)
        best = np.full(images, np.inf, np.float32)
        np.minimum.at(best, owners, positives)
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
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument(
        "--case", nargs=2, type=count, metavar=("IMAGES", "CAPTIONS"), help="measure one case in this process"
    )
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
