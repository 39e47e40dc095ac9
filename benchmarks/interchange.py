"""Time and memory of import and export: `python -m benchmarks.interchange [--quick] [--json]`.

Runs each command in a new process, on models with random weights. Measures seconds, and peak resident memory above that
of the imported libraries. A ternary model is also exported to every format and imported back. Exits with 1 if a figure
is over its budget. Needs Linux and 6 GB of disk; does not need PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tclip_jax.artifacts import pack_params, read_artifact, write_artifact
from tclip_jax.artifacts.pack import flatten
from tclip_jax.artifacts.safetensors import LazyArray, write_safetensors
from tclip_jax.cli import main as tclip
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.open_clip import open_clip_table
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.presets import PRESETS
from tclip_jax.runs.checkpoints import CheckpointConfig, Checkpoints
from tclip_jax.runs.config import base_config, run_config
from tclip_jax.ternary import TernaryTensor

SMALL = CLIPConfig(
    embed_dim=64,
    vision=VisionConfig((64, 64), 16, 256, 2, 64),
    text=TextConfig(width=256, heads=4, layers=2),
)
FORMATS = "open_clip,hf,gguf-tq1_0,gguf-tq2_0"
_MEASURED = r"""
import json, re, sys, time
import jax
from tclip_jax.cli import main
from tclip_jax.interop import export, importing
from tclip_jax.inference import load
jax.numpy.ones(2).block_until_ready()

def peak():  # ru_maxrss would include the peak of the parent process
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])

before, started, worked = peak(), time.perf_counter(), time.process_time()
code = main(sys.argv[1:])
print(json.dumps([code, time.perf_counter() - started, time.process_time() - worked, peak() - before, peak()]))
"""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured value and its upper bound; infinity: no bound."""

    model: str
    name: str
    value: float
    budget: float = math.inf

    @property
    def passed(self) -> bool:
        return self.value <= self.budget


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a command: elapsed seconds, processor seconds, bytes added to the peak resident memory, and that peak."""

    seconds: float
    processor: float
    added: int
    peak: int


def measure(*arguments: str | pathlib.Path) -> Cost:
    """Run `tclip` in a new process and return its cost."""
    command = [sys.executable, "-c", _MEASURED, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    code, *cost = json.loads(done.stdout.splitlines()[-1])
    if code:
        raise RuntimeError(f"tclip {' '.join(command[3:])} ended with {code}: {done.stderr.splitlines()[-1]}")
    return Cost(*cost)


def run(*arguments: str | pathlib.Path) -> None:
    """Run `tclip` in this process, without its output."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = tclip([str(argument) for argument in arguments])
    if code:
        raise RuntimeError(f"tclip {arguments} ended with {code}")


def write_random(folder: pathlib.Path, config: CLIPConfig) -> int:
    """Write a folder of open_clip with random weights, one tensor at a time; return its bytes in float32."""
    folder.mkdir()
    rng = np.random.default_rng(0)

    def random(shape: tuple[int, ...]) -> LazyArray:
        return LazyArray(shape, np.dtype(np.float32), lambda: np.float32(0.02) * rng.standard_normal(shape, np.float32))

    state = {entry.key: random(entry.shape) for entry in open_clip_table(config)}
    write_safetensors(folder / "open_clip_model.safetensors", state)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config.to_open_clip()}))
    return 4 * sum(int(np.prod(entry.shape)) for entry in open_clip_table(config))


def cost_figures(name: str, config: CLIPConfig, folder: pathlib.Path) -> Iterator[Figure]:
    """Measure the import of a float model and its export; import and export the result again."""
    size, large = write_random(folder / "theirs", config), name == "ViT-L-14"
    # For a small model, the allocations of the libraries exceed the size of the model.
    budget = 1.5 if size > 2**28 else math.inf
    cost = measure("import", folder / "theirs", "--out", folder / "artifact")
    yield Figure(name, "import: seconds", cost.seconds, 20 if large else math.inf)
    yield Figure(name, "import: processor seconds", cost.processor)
    yield Figure(name, "import: peak memory of the process, GiB", cost.peak / 2**30, 2.5 if large else math.inf)
    yield Figure(name, "import: added memory / float32 model", cost.added / size, budget)
    cost = measure("export", folder / "artifact", "--out", folder / "release")
    yield Figure(name, "export: seconds", cost.seconds)
    yield Figure(name, "export: processor seconds", cost.processor)
    yield Figure(name, "export: added memory / float32 model", cost.added / size, budget)
    run("import", folder / "release", "--out", folder / "artifact", "--overwrite")
    run("export", folder / "artifact", "--out", folder / "again")
    differ = _differ(folder / "release", folder / "again")
    yield Figure(name, "files that export → import → export changes", differ, 0)


def ternary_figures(name: str, config: CLIPConfig, folder: pathlib.Path) -> Iterator[Figure]:
    """Measure the export of a ternary run and of its artifact; count trits and scales that a format changes."""
    size, packed = _write_student(folder, config)
    budget = 1.5 if size > 2**28 else math.inf
    for source, title in ((folder / "run", "a ternary run"), (folder / "student", "its artifact")):
        cost = measure("export", source, "--to", FORMATS, "--out", folder / "release", "--overwrite")
        yield Figure(name, f"export of {title} to 4 formats: seconds", cost.seconds)
        yield Figure(name, f"export of {title}: added memory / float32 model", cost.added / size, budget)
    sources = {"open_clip": folder / "release"} | {path.name: path for path in folder.glob("release/*.gguf")}
    for dtype in ("bfloat16", "float16"):
        sources[dtype] = folder / dtype
        run("export", folder / "student", "--to", "open_clip", "--dtype", dtype, "--out", sources[dtype])
    sources["transformers"] = folder / "hf"
    run("export", folder / "student", "--to", "hf", "--out", folder / "hf")
    (folder / "hf" / "open_clip_config.json").unlink()
    for title, path in sources.items():
        run("import", path, "--out", folder / "back", "--overwrite")
        yield Figure(name, f"trits and scales that {title} changes", _changed(packed, folder / "back"), 0)


def _write_student(folder: pathlib.Path, config: CLIPConfig) -> tuple[int, dict[str, Any]]:
    """Write a run with random latent weights, and its artifact; return the float32 bytes and the packed weights."""
    recipe = base_config()
    with recipe.unlocked():
        recipe.update({"model": config.to_open_clip(), "ternary": "Q-ALL"})
    rules = run_config(recipe).rules
    rng = np.random.default_rng(0)
    latent = jax.tree.map(
        lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32)), param_shapes(config)
    )
    with Checkpoints(folder / "run" / "checkpoints", CheckpointConfig()) as checkpoints:
        checkpoints.save(1, {"params": latent}, {})
    (folder / "run" / "config.json").write_text(recipe.to_json())
    packed = pack_params(latent, rules)
    pixels = Preprocess(config.vision.image_size)
    fields: dict[str, Any] = {"config": config, "preprocess": pixels, "rules": rules, "rest_dtype": "float32"}
    write_artifact(folder / "student", params=packed, **fields)
    return sum(4 * leaf.size for leaf in jax.tree.leaves(latent)), packed


def _differ(a: pathlib.Path, b: pathlib.Path) -> int:
    # Model cards differ, because they name the source of the weights.
    files = [{path.name: path.read_bytes() for path in each.iterdir() if path.name != "README.md"} for each in (a, b)]
    return sum(files[0].get(name) != files[1].get(name) for name in files[0].keys() | files[1].keys())


def _changed(expected: dict[str, Any], folder: pathlib.Path) -> int:
    """Count trits and scales that differ in an artifact; all trits of a weight that is float or has other groups."""
    imported, count = flatten(read_artifact(folder).params), 0
    for path, leaf in flatten(expected).items():
        if isinstance(leaf, TernaryTensor):
            tensor = imported[path]
            if isinstance(tensor, TernaryTensor) and tensor.scale.shape == leaf.scale.shape:
                count += int(np.sum(tensor.trits != leaf.trits)) + int(np.sum(tensor.scale != leaf.scale))
            else:
                count += leaf.trits.size
    return count


def figures(quick: bool) -> Iterator[Figure]:
    """Yield each figure as soon as it is measured."""
    presets = {name: CLIPConfig.from_open_clip(PRESETS[name]) for name in ("ViT-B-16", "ViT-L-14")}
    for measured in (cost_figures, ternary_figures):
        for name, config in {"small": SMALL}.items() if quick else presets.items():
            with tempfile.TemporaryDirectory() as folder:
                yield from measured(name, config, pathlib.Path(folder))


def main() -> int:
    """Print a line per figure, and with --json one object last."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.interchange", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only a small model; under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    measured = []
    for figure in figures(args.quick):
        measured.append(figure)
        budget = f"  budget {figure.budget:g}" if figure.budget < math.inf else ""
        mark = "" if figure.passed else "  OVER"
        print(f"{figure.model:10}{figure.name:60}{figure.value:>12.4g}{budget}{mark}", flush=True)
    passed = all(figure.passed for figure in measured)
    if args.json:
        rows = [
            {**dataclasses.asdict(each), "budget": each.budget if each.budget < math.inf else None} for each in measured
        ]
        print(json.dumps({"passed": passed, "figures": rows}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
