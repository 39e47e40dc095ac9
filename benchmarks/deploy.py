"""Every export of one model: time and memory to write it, its size, and its image tower in the runtime it is for.

python -m benchmarks.deploy                          ViT-B/16 Q-ALL: about ten minutes
python -m benchmarks.deploy --model ViT-B-32 --rounds 1
python -m benchmarks.deploy --quick --json | tail -1

The weights are random. Each export is a `tclip export` in a new process; its memory is the largest resident set of the
process, and both include the verification of the files. The runtimes take turns for several rounds, each measurement
in a new process with as many threads as this process has processors, one image at a time. `max |Δ|` and `least cosine`
compare embeddings with those by PyTorch in float64. Exits with 1 if an export or a runtime fails.

Needs the extras `torch` and `onnx`, OpenVINO, and `litert` for its rows: what is not installed is left out and named.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import tqdm

from benchmarks.deploy_runtimes import RUNTIMES
from benchmarks.peers import ARTIFACT, Task, missing
from benchmarks.runtimes import MODELS, Outcome, Row, about, measure_once, print_omissions, run_apart
from tclip_jax.pages import aligned
from tclip_jax.schema import count, number

# Folder of an export -> options of `tclip export`, and its files of the image and the text tower, or of both.
EXPORTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "onnx": (("--to", "onnx"), ("onnx/vision_model_q2.onnx", "onnx/text_model_q2.onnx")),
    "onnx16": (
        ("--to", "onnx", "--dtype", "float16"),
        ("onnx/vision_model_q2f16.onnx", "onnx/text_model_q2f16.onnx"),
    ),
    "fp32": (("--to", "onnx-fp32"), ("onnx/vision_model.onnx", "onnx/text_model.onnx")),
    "litert": (("--to", "litert"), ("litert/image.tflite", "litert/text.tflite")),
    "torch": (("--to", "torch"), ("torch/model.safetensors",)),
    "stablehlo": (("--to", "stablehlo"), ("stablehlo/weights.safetensors",)),
}
QUICK = ("tclip_jax A8", "onnx in ONNX Runtime", "onnx in OpenVINO")


def export(folder: pathlib.Path, name: str) -> Row:
    """Export the artifact of a folder, and return seconds, peak bytes, and the bytes of each tower.

    Raises:
      RuntimeError: the export failed; the message is its last line.
    """
    options, files = EXPORTS[name]
    out = str(folder / name)
    command = [sys.executable, "-m", "tclip_jax", "export", str(folder / ARTIFACT), *options, "--out", out]
    begun = time.monotonic()
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            command, stdout=printed, stderr=subprocess.STDOUT, env={**os.environ, "JAX_PLATFORMS": "cpu"}
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        lines = printed.read().decode(errors="replace").strip().splitlines()
    if process.returncode:
        raise RuntimeError(lines[-1] if lines else f"tclip export ended with {process.returncode}")
    sizes = [(folder / name / file).stat().st_size for file in files]
    return {
        "export": " ".join(options[1:]),
        "seconds": time.monotonic() - begun,
        "peak_bytes": usage.ru_maxrss * 1024,
        "image_bytes": sizes[0] if len(sizes) > 1 else None,
        "text_bytes": sizes[1] if len(sizes) > 1 else None,
        "bytes": sum(sizes),
    }


def measured(folder: pathlib.Path, args: argparse.Namespace) -> tuple[list[Row], Outcome]:
    """Write the model, export it, and time each runtime once per round, in turn.

    Returns:
      A row for each export, and what was measured of the runtimes.

    Raises:
      RuntimeError: the model cannot be written.
    """
    outcome, rows = Outcome(), list[Row]()
    for name, runtime in RUNTIMES.items():
        if absent := missing(runtime.modules):
            outcome.left_out[name] = f"not installed: {', '.join(absent)}"
        elif args.quick and name not in QUICK:
            outcome.left_out[name] = "not with --quick"
    Task(args.model, "image", (1,), args.seconds, (ARTIFACT,)).write(folder)
    names = [name for name in RUNTIMES if name not in outcome.left_out]
    needed = {RUNTIMES[name].file.partition("/")[0] for name in names}
    exports = [name for name in EXPORTS if name in needed]
    with tqdm.tqdm(total=1 + len(exports) + args.rounds * len(names), disable=None, leave=False) as bar:
        bar.set_description("writing the model")
        run_apart("benchmarks.peer_files", folder)
        bar.update()
        for name in exports:
            bar.set_description(f"exporting {name}")
            try:
                rows.append(export(folder, name))
            except RuntimeError as error:
                outcome.failed[f"tclip export {' '.join(EXPORTS[name][0])}"] = str(error)
                lost = [each for each in names if RUNTIMES[each].file.startswith(f"{name}/")]
                outcome.left_out |= dict.fromkeys(lost, "its export failed")
            bar.update()
        for _ in range(args.rounds):
            for name in names:
                bar.set_description(name)
                if name not in outcome.left_out | outcome.failed:
                    measure_once("benchmarks.deploy_runtimes", folder, name, outcome)
                bar.update()
    return rows, outcome


def rows_of(outcome: Outcome) -> list[Row]:
    """Return a row for each runtime, the fastest first; `over_ours` is its least time / that of the first of ours."""
    rows: list[Row] = [
        {
            "runtime": name,
            "least_ms": min(each["least_ms"] for (each,) in figures),
            "median_ms": statistics.median(each["median_ms"] for (each,) in figures),
            "max_error": max(each["max_error"] for (each,) in figures),
            "least_cosine": min(each["least_cosine"] for (each,) in figures),
        }
        for name, figures in outcome.rounds.items()  # each round has one batch size
    ]
    ours = next((row["least_ms"] for row in rows if row["runtime"] == next(iter(RUNTIMES))), None)
    for row in rows:
        row["over_ours"] = row["least_ms"] / ours if ours else None
    return sorted(rows, key=lambda row: row["least_ms"])


def print_tables(exports: list[Row], rows: list[Row], model: str) -> None:
    """Print a table of the exports and one of the runtimes."""

    def megabytes(size: int | None) -> str:
        return "" if size is None else f"{size / 1e6:.1f}"

    lines = [["export", "image MB", "text MB", "both MB", "seconds", "peak GB"]]
    for row in exports:
        sizes = [megabytes(row[key]) for key in ("image_bytes", "text_bytes", "bytes")]
        lines.append([row["export"], *sizes, f"{row['seconds']:.1f}", f"{row['peak_bytes'] / 1e9:.2f}"])
    print(f"\n{model} Q-ALL", *aligned(lines), sep="\n")
    first = next(iter(RUNTIMES))
    lines = [["one image", "least ms", "median ms", f"/ {first}", "max |Δ|", "least cosine"]]
    for row in rows:
        ratio = "" if row["over_ours"] is None else f"{row['over_ours']:.2f}"
        times = [f"{row['least_ms']:.2f}", f"{row['median_ms']:.2f}", ratio]
        lines.append([row["runtime"], *times, f"{row['max_error']:.1e}", f"{row['least_cosine']:.6f}"])
    print("", *aligned(lines), "", sep="\n")


def arguments() -> argparse.Namespace:
    """Parse the command line; --quick replaces the size and the repetitions."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deploy", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="the preset (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=5, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=number(float, gt=0), default=3, metavar="S", help="per measurement (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="preset 'tiny', one export and one round; under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if args.quick:
        args.model, args.rounds, args.seconds = "tiny", 1, 0.1
    return args


def main() -> int:
    """Print the tables, and with --json one object last."""
    args = arguments()
    machine = about()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            exports, outcome = measured(pathlib.Path(temporary), args)
        except (RuntimeError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
    rows = rows_of(outcome)
    print_tables(exports, rows, args.model)
    print_omissions(outcome)
    if args.json:
        results = {"exports": exports, "rows": rows, "left_out": outcome.left_out, "failed": outcome.failed}
        print(json.dumps({**machine, "model": args.model, "rounds": args.rounds, **results}))
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
