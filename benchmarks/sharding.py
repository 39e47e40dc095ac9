"""Differences of sharded training from one device: `python -m benchmarks.sharding [--quick] [--json]`.

Trains a small distilled model in float32 on meshes of eight simulated devices, and on one device. In full precision
both train on their own. The ternary model on a mesh computes every tenth step from the state of the one-device run, and
must reproduce its trits, loss and gradients. It also trains on its own, and the first trit that differs is named. In
bfloat16 the first step on 2, 4 and 8 devices must reproduce the loss and the gradient norm of one device. Exits with 1
if a difference is over its budget.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

# Eight devices share the cores with other programs, so a device may be late for a collective: the time-outs are long.
# Without LLVM's optimizations, compilation takes half the time.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import TernaryRules, ternary_rules
from tclip_jax.models.trits import trit_snapshot
from tclip_jax.parallel.mesh import AXES, make_mesh, shard_batch
from tclip_jax.parallel.sharding import tree_shardings
from tclip_jax.runs.config import LossConfig, OptimizerConfig
from tclip_jax.ternary import Quantizer
from tclip_jax.training.objective import Encoders
from tclip_jax.training.optimizer import make_optimizer
from tclip_jax.training.state import TrainState, init_state
from tclip_jax.training.step import make_train_step

MESHES = ((8, 1, 1), (4, 2, 1), (2, 4, 1), (2, 2, 2), (1, 4, 2), (2, 1, 4))
QUICK = ((2, 2, 2),)
NARROW_MESHES = ((2, 1, 1), (1, 2, 1), (4, 1, 1), (2, 2, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2))
STEPS, FREE, APART = 50, 20, 10
BUDGETS = {"full": 1e-5, "same": 1e-6, "gradient": 1e-5, "free": 1e-4}  # relative
NARROW_BUDGETS = {"loss": 1e-3, "gradient_norm": 1e-2}  # of the first step in bfloat16
ROWS = 16
CONFIG = CLIPConfig(
    32,
    VisionConfig((16, 16), patch_size=8, width=64, layers=2, head_width=16),
    TextConfig(context_length=8, vocab_size=128, width=32, heads=4, layers=2),
)
TEACHER = CLIPConfig(48, CONFIG.vision, CONFIG.text)
TERNARY = ternary_rules("Q-ALL", Quantizer(group=8))
LOSS = LossConfig(task=1.0, crd=1.0, fd=10.0)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=5)
HALF = (0.5, 0.5, 0.5)


class Run(NamedTuple):
    """A student and its teacher on a mesh."""

    mesh: Mesh
    state: TrainState
    teacher: Any
    compiled: Any

    def step(self, state: TrainState, index: int) -> tuple[TrainState, float]:
        """Return the next state, and the loss of batch `index`."""
        state, metrics = self.step_with_metrics(state, index)
        return state, metrics["loss"]

    def step_with_metrics(self, state: TrainState, index: int) -> tuple[TrainState, dict[str, float]]:
        """Return the next state, and all metrics of batch `index`."""
        rng = np.random.default_rng(index)
        batch = {
            "image": rng.integers(0, 256, (ROWS, 16, 16, 3), np.uint8),
            "tokens": rng.integers(0, 128, (ROWS, 8), np.int32),
            "weight": np.ones(ROWS, np.float32),
        }
        with jax.set_mesh(self.mesh):
            # Block: simulated devices that run different programs can deadlock.
            state, metrics = jax.block_until_ready(self.compiled(state, shard_batch(batch, self.mesh), self.teacher))
        return state, {name: float(value) for name, value in metrics.items()}

    def trits(self, state: TrainState) -> dict[str, np.ndarray]:
        """Return the trits of every ternary parameter, computed on this mesh."""
        with jax.set_mesh(self.mesh):
            snapshot = jax.device_get(
                trit_snapshot(state.params["clip"], TERNARY, CONFIG.text.vocab_size * CONFIG.vision.width * 64)
            )
        return {path: tensor.trits for path, tensor in snapshot.items()}


class Reference(NamedTuple):
    """A run on one device: states before each step and after the last (on the host), losses, and trits."""

    states: list[TrainState]
    losses: list[float]
    trits: list[dict[str, np.ndarray]]


@functools.cache
def initial_state() -> tuple[TrainState, Any]:
    """Return the initial state and the teacher's parameters, computed on one device so that all meshes start equal."""
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = init_state(CLIP(CONFIG, TERNARY), make_optimizer(OPTIMIZER, 1000), 0, TEACHER, mesh, LOSS)
        teacher = jax.jit(functools.partial(init_params, CLIP(TEACHER)))(jax.random.key(7))
    return jax.device_get((state, teacher))


def place(tree: Any, mesh: Mesh) -> Any:
    """Put host arrays on a mesh."""
    return jax.device_put(tree, tree_shardings(tree, mesh))


def start(mesh: Mesh, rules: TernaryRules, dtype: jax.typing.DTypeLike = jnp.float32) -> Run:
    """Return a run on a mesh with the common initial weights."""
    state, teacher = (place(tree, mesh) for tree in initial_state())
    optimizer = make_optimizer(OPTIMIZER, 1000)
    student, guide = (Encoders(CLIP(*each, dtype), HALF, HALF) for each in ((CONFIG, rules), (TEACHER, ())))
    step = make_train_step(student, guide, optimizer, LOSS)
    return Run(mesh, state, teacher, jax.jit(step, out_shardings=(tree_shardings(state, mesh), None)))


def train(run: Run, steps: int) -> Reference:
    """Train `steps` steps and record the reference."""
    state, reference = run.state, Reference([], [], [])
    for index in range(steps):
        reference.states.append(jax.device_get(state))
        reference.trits.append(run.trits(state))
        state, loss = run.step(state, index)
        reference.losses.append(loss)
    reference.states.append(jax.device_get(state))
    return reference


def difference(a: float, b: float) -> float:
    """Return |b − a| / |a|."""
    return abs(b - a) / abs(a)


def gradient_difference(before: TrainState, one: TrainState, other: TrainState) -> float:
    """Return the largest |Δg| / |g| over parameters, with g from Adam's first moment: m' = b1 · m + (1 − b1) · g."""
    moments = [optax.tree.get(state.optimizer, "mu") for state in (before, one, other)]

    def relative(m: Any, ours: Any, theirs: Any) -> float:
        ours, theirs = np.float64(ours), np.float64(theirs)
        norm = np.linalg.norm(ours - OPTIMIZER.b1 * np.float64(m))
        return float(np.linalg.norm(theirs - ours) / norm) if norm else float(np.linalg.norm(theirs - ours))

    return max(jax.tree.leaves(jax.tree.map(relative, *(jax.device_get(m) for m in moments))))


def first_flip(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> str:
    """Return the position of the first trit that differs, or ""."""
    for path, mine in ours.items():
        if (where := np.argwhere(mine != theirs[path])).size:
            return f"{path}[{', '.join(map(str, where[0]))}] ({len(where)} there)"
    return ""


def compare(sizes: tuple[int, int, int], steps: int, full: Reference, ternary: Reference) -> dict[str, Any]:
    """Return the differences of one mesh from one device."""
    mesh = make_mesh(*sizes)
    row: dict[str, Any] = {"mesh": dict(zip(AXES, sizes, strict=True)), "full": 0.0}
    run = start(mesh, ())
    state = run.state
    for index in range(steps):
        state, loss = run.step(state, index)
        row["full"] = max(row["full"], difference(full.losses[index], loss))
    run = start(mesh, TERNARY)
    row |= {"trits": True, "same": 0.0, "gradient": 0.0, "free": 0.0, "first_flip": ""}
    for index in range(0, steps + 1, APART):
        before = place(ternary.states[index], mesh)
        row["trits"] &= not first_flip(ternary.trits[index], run.trits(before))
        after, loss = run.step(before, index)
        row["same"] = max(row["same"], difference(ternary.losses[index], loss))
        row["gradient"] = max(
            row["gradient"], gradient_difference(ternary.states[index], ternary.states[index + 1], after)
        )
    state = run.state
    for index in range(min(FREE, steps)):
        state, loss = run.step(state, index)
        row["free"] = max(row["free"], difference(ternary.losses[index], loss))
        if not row["first_flip"] and (where := first_flip(ternary.trits[index + 1], run.trits(state))):
            row["first_flip"] = f"step {index + 1}: {where}"
    row["passed"] = row["trits"] and all(row[name] <= budget for name, budget in BUDGETS.items())
    return row


def first_step(sizes: tuple[int, int, int], rules: TernaryRules) -> dict[str, float]:
    """Return the metrics of the first step in bfloat16, on a mesh of these sizes."""
    run = start(make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)]), rules, jnp.bfloat16)
    return run.step_with_metrics(run.state, 0)[1]


def compare_narrow(meshes: Sequence[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Return the larger difference of a full-precision and a ternary model from one device in bfloat16, per mesh."""
    one = {rules: first_step((1, 1, 1), rules) for rules in ((), TERNARY)}
    rows = []
    for sizes in tqdm(meshes, disable=None):
        metrics = {rules: first_step(sizes, rules) for rules in one}
        row: dict[str, Any] = {"mesh": dict(zip(AXES, sizes, strict=True))}
        for name in NARROW_BUDGETS:
            row[name] = max(difference(one[rules][name], metrics[rules][name]) for rules in one)
        rows.append(row | {"passed": all(row[name] <= budget for name, budget in NARROW_BUDGETS.items())})
    return rows


def main() -> int:
    """Print the table, and with --json one object last."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharding", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one mesh and 10 steps; under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    steps = APART if args.quick else STEPS
    one = make_mesh(devices=jax.devices()[:1])
    full, ternary = (train(start(one, rules), steps + 1) for rules in ((), TERNARY))
    rows = [compare(sizes, steps, full, ternary) for sizes in tqdm(QUICK if args.quick else MESHES, disable=None)]
    print(f"largest relative difference from one device, {steps} steps ({min(FREE, steps)} of free ternary training)")
    print(f"{'data fsdp tensor':>16}{'full':>10}{'trits':>8}{'same':>10}{'gradient':>10}{'free':>10}  first other trit")
    for row in rows:
        sizes = "".join(f"{size:>5}" for size in row["mesh"].values())
        numbers = [f"{row[name]:>10.1e}" for name in BUDGETS]
        numbers.insert(1, f"{'equal' if row['trits'] else 'DIFFER':>8}")
        print(f"{sizes:>16}{''.join(numbers)}  {row['first_flip'] or 'none'}{'' if row['passed'] else '  OVER'}")
    budgets = "".join(f"{budget:>10.0e}" for budget in BUDGETS.values())
    print(f"{'budget':>16}{budgets[:10]}{'equal':>8}{budgets[10:]}")
    narrow = compare_narrow(NARROW_MESHES[-1:] if args.quick else NARROW_MESHES)
    print(f"\nthe first step in bfloat16\n{'data fsdp tensor':>16}{'loss':>10}{'|gradient|':>12}")
    for row in narrow:
        sizes = "".join(f"{size:>5}" for size in row["mesh"].values())
        over = "" if row["passed"] else "  OVER"
        print(f"{sizes:>16}{row['loss']:>10.1e}{row['gradient_norm']:>12.1e}{over}")
    print(f"{'budget':>16}{NARROW_BUDGETS['loss']:>10.0e}{NARROW_BUDGETS['gradient_norm']:>12.0e}")
    passed = all(row["passed"] for row in (*rows, *narrow))
    if args.json:
        print(json.dumps({"steps": steps, "budgets": BUDGETS, "rows": rows, "bfloat16": narrow, "passed": passed}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
