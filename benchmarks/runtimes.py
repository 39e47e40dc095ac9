"""Speed of one tower in tclip_jax and in the runtimes that one could use instead, with the same weights.

python -m benchmarks.runtimes                           ViT-B/16, images, batches of 1 and 8: about half an hour
python -m benchmarks.runtimes --tower text              texts, batches of 1 and 64
python -m benchmarks.runtimes --runtimes tclip_jax ONNX    only the runtimes whose names begin so
python -m benchmarks.runtimes --embed                   also `tclip embed` against open_clip, on a folder of JPEGs
python -m benchmarks.runtimes --quick --json | tail -1

The weights are random and ternary (Q-ALL); every runtime computes with the same values, as float32, or as it quantizes
them. The runtimes take turns for several rounds, and each measurement is a new process with as many threads as this
process has processors. Inputs are ready in the runtime's own form. Times are the least of all rounds, and the median of
the rounds' medians. A ratio is our least time / the runtime's: below 1 we are faster. In parentheses are the least and
the largest ratio of one round, whose measurements are neighbours in time. `max |Δ|` and `least cosine` compare
embeddings with those by PyTorch in float64. MB is the size of the tower's weights in the file that is read; the
bfloat16 runtimes read float32. Exits with 1 if a runtime fails.

Needs the extras `torch` and `bench`. Runtimes that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, get_args

import tqdm

from benchmarks.embed_speed import embed_speed, embed_text
from benchmarks.peers import ARTIFACT, OURS, PEERS, Task, missing, processor_flags, runtime
from tclip_jax.pages import aligned
from tclip_jax.schema import count, number
from tclip_jax.ternary.tensor import Activations

MODELS = ("ViT-B-16", "ViT-B-32", "ViT-L-14")
BATCHES = {"image": (1, 8), "text": (1, 64)}
FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "i8mm", "bf16")
PACKAGES = ("tclip-jax", "jax", "torch", "open_clip_torch", "onnxruntime", "openvino", "ai-edge-litert")
SLOW_FILES = ("LiteRT", "converting the model takes too long for --quick; --runtimes LiteRT includes it")
EXTRA = "pip install 'tclip-jax[bench]'"

Row = dict[str, Any]
Rounds = dict[str, list[list[dict[str, float]]]]  # runtime -> round -> batch size -> figures


@dataclasses.dataclass
class Outcome:
    """What was measured, and what was not.

    Attributes:
      rounds: for each runtime, the figures of each round and batch size.
      left_out: the reason for each runtime without figures that cannot run here.
      failed: the error of each runtime that failed.
      sizes: bytes of each runtime's weights.
    """

    rounds: Rounds = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)


def about() -> Row:
    """Return the processor, the threads and the versions, after printing them."""
    found: Row = {"processor": processor(), "threads": len(os.sched_getaffinity(0)), "versions": versions()}
    print(f"{found['processor']}, {found['threads']} threads")
    print(", ".join(f"{package} {version}" for package, version in found["versions"].items()), flush=True)
    return found


def processor() -> str:
    """Return the processor's name and those of its instruction sets that matter here."""
    file = pathlib.Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    flags = processor_flags()
    return f"{name} ({', '.join(flag for flag in FLAGS if flag in flags) or 'none of the instruction sets looked for'})"


def versions() -> dict[str, str]:
    """Return the versions of the installed packages."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def run_apart(module: str, *arguments: str | pathlib.Path) -> str:
    """Run a module in a new process and return what it prints.

    Raises:
      RuntimeError: it failed; the message is its last line.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"{module} ended with {done.returncode}")
    return done.stdout


def chosen_names(prefixes: Sequence[str]) -> list[str]:
    """Return the runtimes whose names begin with one of the prefixes, or all; ours first.

    Raises:
      ValueError: no runtime begins with a prefix.
    """
    names = [*(f"{OURS} {activations}" for activations in get_args(Activations)), *PEERS]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"no runtime begins with {prefix!r}: there are {', '.join(names)}")
    return [name for name in names if not prefixes or name.startswith(tuple(prefixes))]


def measured(folder: pathlib.Path, names: Sequence[str], args: argparse.Namespace) -> Outcome:
    """Write the files for the runtimes to a folder, and measure each runtime once per round, in turn.

    Raises:
      RuntimeError: the files cannot be written.
    """
    outcome = Outcome()
    if args.quick and not args.runtimes:
        outcome.left_out = {name: SLOW_FILES[1] for name in names if name.startswith(SLOW_FILES[0])}
    for name in names:
        absent = missing(runtime(name).modules)
        if absent:
            outcome.left_out[name] = f"not installed: {', '.join(absent)} ({EXTRA})"
    names = [name for name in names if name not in outcome.left_out]
    files = tuple(dict.fromkeys([ARTIFACT, *(runtime(name).file for name in names)]))
    Task(args.model, args.tower, args.batches, args.seconds, files).write(folder)
    with tqdm.tqdm(total=args.rounds * len(names) + 1, disable=None, leave=False) as bar:
        bar.set_description("writing the files")
        sizes = json.loads(run_apart("benchmarks.peer_files", folder).splitlines()[-1])
        outcome.sizes = {name: sizes[runtime(name).file] for name in names}
        bar.update()
        for _ in range(args.rounds):
            for name in names:
                bar.set_description(name)
                if name not in outcome.left_out | outcome.failed:
                    measure_once("benchmarks.peers", folder, name, outcome)
                bar.update()
    return outcome


def measure_once(module: str, folder: pathlib.Path, name: str, outcome: Outcome) -> None:
    """Add a round of one runtime, which `module` measures, to the outcome; one that fails loses its earlier rounds."""
    try:
        printed = json.loads(run_apart(module, folder, name).splitlines()[-1])
    except RuntimeError as error:
        outcome.failed[name] = str(error)
        outcome.rounds.pop(name, None)
        return
    if "unsupported" in printed:
        outcome.left_out[name] = printed["unsupported"]
    else:
        outcome.rounds.setdefault(name, []).append(printed["rows"])


def rows_of(outcome: Outcome, batches: Sequence[int]) -> list[Row]:
    """Return a row for each batch size and runtime, the fastest first within a batch size.

    `ratios` holds for each of ours its least time / the runtime's, and the least and largest ratio of a round.
    """
    rows = []
    for index, batch in enumerate(batches):
        times = {name: [each[index]["least_ms"] for each in rounds] for name, rounds in outcome.rounds.items()}
        for name in sorted(times, key=lambda name: min(times[name])):
            figures = [each[index] for each in outcome.rounds[name]]
            rows.append(
                {
                    "runtime": name,
                    "batch": batch,
                    "weight_bytes": outcome.sizes[name],
                    "least_ms": min(times[name]),
                    "median_ms": statistics.median(each["median_ms"] for each in figures),
                    "round_ms": times[name],
                    "max_error": max(each["max_error"] for each in figures),
                    "least_cosine": min(each["least_cosine"] for each in figures),
                    "ratios": {our: _ratio(times[our], times[name]) for our in times if our.startswith(f"{OURS} ")},
                }
            )
    return rows


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    neighbours = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"ratio": min(ours) / min(theirs), "least": min(neighbours), "largest": max(neighbours)}


def table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the rows of one batch size."""
    ours = list(rows[0]["ratios"])
    head = ["runtime", "MB", "least ms", "median ms", *(f"{each.removeprefix(f'{OURS} ')} / it" for each in ours)]
    lines = [[*head, "max |Δ|", "least cosine"]]
    for row in rows:
        ratios = ["{ratio:.2f} ({least:.2f}–{largest:.2f})".format(**row["ratios"][each]) for each in ours]
        times = [f"{row['least_ms']:.2f}", f"{row['median_ms']:.2f}"]
        errors = [f"{row['max_error']:.1e}", f"{row['least_cosine']:.6f}"]
        lines.append([row["runtime"], f"{row['weight_bytes'] / 1e6:.1f}", *times, *ratios, *errors])
    return aligned(lines)


def markdown(rows: Sequence[Row], tower: str) -> list[str]:
    """Return the lines of a table in Markdown with all batch sizes, the fastest of the largest batch first."""
    batches = sorted({row["batch"] for row in rows})
    ours = [each for each in reversed(rows[0]["ratios"]) if not each.endswith("A32")]
    times = [f"{batch} {tower if tower == 'text' else 'image'}{'s' * (batch > 1)}, ms" for batch in batches]
    head = ["runtime", "MB", *times, *(f"{each.removeprefix(f'{OURS} ')} / it" for each in ours), "least cosine"]
    lines = [head, ["---"] * len(head)]
    for last in [row for row in rows if row["batch"] == batches[-1]]:
        own = sorted((row for row in rows if row["runtime"] == last["runtime"]), key=lambda row: row["batch"])
        name = f"**{last['runtime']}**" if last["runtime"] in last["ratios"] else last["runtime"]
        ratios = [
            ", ".join("{ratio:.2f} ({least:.2f}–{largest:.2f})".format(**row["ratios"][each]) for row in own)
            for each in ours
        ]
        cosine = f"{min(row['least_cosine'] for row in own):.6f}"
        lines.append(
            [name, f"{last['weight_bytes'] / 1e6:.1f}", *(f"{row['least_ms']:.0f}" for row in own), *ratios, cosine]
        )
    return [f"| {' | '.join(line)} |" for line in lines]


def print_omissions(outcome: Outcome) -> None:
    """Print what was left out, a line for each reason, and what failed."""
    for reason in dict.fromkeys(outcome.left_out.values()):
        names = [name for name, why in outcome.left_out.items() if why == reason]
        print(f"left out ({len(names)}): {', '.join(names)}: {reason}")
    for name, error in outcome.failed.items():
        print(f"FAILED: {name}: {error}")


def print_outcome(outcome: Outcome, rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Print a table for each batch size, and what was left out; with --markdown one table of all batch sizes."""
    if args.markdown and rows:
        print("", *markdown(rows, args.tower), sep="\n")
    for batch in () if args.markdown else args.batches:
        part = [row for row in rows if row["batch"] == batch]
        if part:
            print(f"\n{args.model}, {args.tower} tower, batch {batch}, rounds: {args.rounds}", *table(part), sep="\n")
    print()
    print_omissions(outcome)


def arguments() -> argparse.Namespace:
    """Parse the command line; --quick replaces the size and the repetitions."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtimes", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="the preset (default: %(default)s)")
    parser.add_argument("--tower", choices=tuple(BATCHES), default="image", help="the tower (default: %(default)s)")
    parser.add_argument(
        "--batches", type=_batch_sizes, metavar="N,N", help="inputs per call (default: 1,8 images or 1,64 texts)"
    )
    parser.add_argument("--rounds", type=count, default=5, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=number(float, gt=0), default=4, metavar="S", help="per measurement (default: %(default)s)"
    )
    parser.add_argument("--runtimes", nargs="+", default=[], metavar="NAME", help="beginnings of names (default: all)")
    parser.add_argument("--embed", action="store_true", help="also time `tclip embed` on a folder of JPEGs")
    parser.add_argument("--markdown", action="store_true", help="one table in Markdown, as in docs/performance.md")
    parser.add_argument("--quick", action="store_true", help="preset 'tiny', one input, one round; under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    args.batches = args.batches or BATCHES[args.tower]
    if args.quick:
        args.model, args.batches, args.rounds, args.seconds = "tiny", (1,), 1, 0.1
    try:
        args.names = chosen_names(args.runtimes)
    except ValueError as error:
        parser.error(str(error))
    return args


def _batch_sizes(text: str) -> tuple[int, ...]:
    return tuple(count(each) for each in text.split(","))


def main() -> int:
    """Print the tables, and with --json one object last."""
    args = arguments()
    machine = about()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        try:
            outcome = measured(folder, args.names, args)
            rows = rows_of(outcome, args.batches)
            print_outcome(outcome, rows, args)
            embedded = embed_speed(folder, run_apart, args.rounds, args.quick) if args.embed else None
        except (RuntimeError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
    if embedded:
        print(f"\n{embed_text(embedded)}")
    if args.json:
        task = {key: getattr(args, key) for key in ("model", "tower", "rounds")}
        results = {"rows": rows, "left_out": outcome.left_out, "failed": outcome.failed, "embed": embedded}
        print(json.dumps(machine | task | results))
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
