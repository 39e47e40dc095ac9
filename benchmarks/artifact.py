"""Size, bits per trit, load time and memory of the artifact of a random ViT-B/16 with Q-ALL.

python -m benchmarks.artifact --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import jax

from tclip_jax.artifacts import pack_params, verify_artifact, write_artifact
from tclip_jax.artifacts.inspection import inspect_artifact
from tclip_jax.data.images import Preprocess
from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import model_cfg
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.ternary import Quantizer

# Runs in a new process, so that the memory of initializing the model is not counted.
_LOAD = """
import json, resource, sys, time
import jax
from tclip_jax.inference.load import load_model

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

jax.devices()
before, started, worked = resident(), time.perf_counter(), time.process_time()
model = load_model(sys.argv[1])
jax.block_until_ready(model.params)
seconds, work = time.perf_counter() - started, time.process_time() - worked
print(json.dumps({"seconds": seconds, "cpu_seconds": work, "resident": resident() - before}))
"""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured value and its bound, if any."""

    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def passed(self) -> bool:
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )


def build(preset: str, folder: pathlib.Path) -> tuple[bool, dict[str, Any]]:
    """Write the artifact of a random model; return whether it is equal to the model, and its inspection."""
    config = CLIPConfig.from_open_clip(model_cfg(preset))
    rules = ternary_rules("Q-ALL", Quantizer())
    params = jax.device_get(init_params(CLIP(config), jax.random.key(0)))
    preprocess = Preprocess(config.vision.image_size)
    write_artifact(folder, config=config, preprocess=preprocess, params=pack_params(params, rules), rules=rules)
    outcome = verify_artifact(folder, params, rules, config=config, preprocess=preprocess)
    return not outcome.differences, inspect_artifact(folder)


def load(folder: pathlib.Path, runs: int) -> dict[str, float]:
    """Return medians of seconds and bytes of loading, over `runs` new processes."""
    outcomes = []
    for _ in range(runs):
        ran = subprocess.run([sys.executable, "-c", _LOAD, str(folder)], capture_output=True, text=True, check=True)
        outcomes.append(json.loads(ran.stdout))
    return {key: statistics.median(outcome[key] for outcome in outcomes) for key in outcomes[0]}


def figures(preset: str, runs: int) -> list[Figure]:
    """Return all figures of one preset. The bounds hold for ViT-B/16."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "artifact"
        verified, inspected = build(preset, path)
        loaded = load(path, runs)
    whole = preset == "ViT-B-16"
    return [
        Figure("verified to the bit", verified, "", at_least=1),
        Figure("parameters", inspected["parameters"], ""),
        Figure("ternary share", inspected["ternary_share"], ""),
        Figure("zeros of trits", inspected["zeros"], ""),
        Figure("bits a trit", inspected["bits_per_trit"], "bits"),
        Figure("entropy of trits", inspected["entropy"], "bits"),
        Figure("bits / entropy", inspected["bits_per_trit"] / inspected["entropy"], "", at_most=1.01),
        *(Figure(name, size, "B") for name, size in inspected["bytes"].items()),
        Figure("weight files", inspected["weight_bytes"], "B"),
        Figure("whole folder", inspected["folder_bytes"], "B"),
        Figure("float32", inspected["float32_bytes"], "B"),
        Figure("times smaller than float32", inspected["compression_real"], "x", at_least=20 if whole else None),
        Figure("float32 bits / weight bits (theory)", inspected["compression_theoretical"], "x"),
        Figure("load in a fresh process, elapsed", loaded["seconds"], "s"),
        # Bounded instead of the elapsed time, which depends on the load of the machine.
        Figure("load, of the CPU, all threads", loaded["cpu_seconds"], "s", at_most=2),
        Figure("resident after load, above imports", loaded["resident"], "B"),
    ]


def main() -> int:
    """Print a line per figure, and with --json one object last."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.artifact", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the preset 'tiny', loaded once; under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    preset = "tiny" if args.quick else "ViT-B-16"
    measured = figures(preset, runs=1 if args.quick else 5)
    for figure in measured:
        goals = (("at most", figure.at_most), ("at least", figure.at_least))
        goal = "".join(f"  {name} {value:g}" for name, value in goals if value is not None)
        value = f"{figure.value:,.0f}" if figure.value >= 1000 else f"{figure.value:.4g}"
        print(f"{figure.name:36}{value:>14} {figure.unit:4}{goal}{'' if figure.passed else '  MISSED'}")
    passed = all(figure.passed for figure in measured)
    if args.json:
        rows = [{"name": figure.name, "value": float(figure.value), "passed": figure.passed} for figure in measured]
        print(json.dumps({"preset": preset, "passed": passed, "figures": rows}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
