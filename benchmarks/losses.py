"""Time and memory of the losses over devices: `python -m benchmarks.losses [--quick] [--tpu TOPOLOGY …] [--json]`.

Times the value and gradient of InfoNCE and CRD, all-gathered and in a ring, and a whole step in one and in four
microbatches. Also reports the memory that the compiler allocates for temporaries on each device. The devices are eight
simulated devices of this machine, so the time of a ring on real links is not measured, and only ratios within a run are
meaningful. With --tpu nothing runs: libtpu compiles the loss ahead of time, with equal rows per chip.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import sys
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from tclip_jax.data.images import OPENAI_MEAN, OPENAI_STD
from tclip_jax.losses.contrastive import accuracy_of_rows, info_nce_of_rows
from tclip_jax.losses.distillation import crd_of_rows
from tclip_jax.losses.exchange import Exchange, Gather, Ring
from tclip_jax.losses.statistics import compare
from tclip_jax.models.clip import CLIP
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import model_cfg
from tclip_jax.parallel.mesh import BATCH_AXES, make_mesh, shard_batch
from tclip_jax.runs.config import LossConfig, OptimizerConfig
from tclip_jax.schema import count
from tclip_jax.training.objective import Encoders
from tclip_jax.training.optimizer import make_optimizer
from tclip_jax.training.state import init_state
from tclip_jax.training.step import make_train_step

FORMS: dict[str, Exchange] = {"gather": Gather(BATCH_AXES), "ring": Ring(BATCH_AXES, 128)}
STUDENT, TEACHER, TEXT = 512, 768, 77  # widths of ViT-B/16 and L/14, tokens
TPU_ROWS = 128  # per chip


def compiled_loss(form: str, mesh: Mesh, rows: int, widths: tuple[int, int], tokens: int) -> Any:
    """Compile value, gradient and accuracy of the loss of a batch of `rows` for a mesh; also returns the arguments."""

    def loss(image: Any, text: Any, scale: Any, their_image: Any, their_text: Any, tokens: Any, weight: Any) -> Any:
        teacher = their_image, their_text, 100.0
        sides = compare(image, text, scale, teacher=teacher, tokens=tokens, weight=weight, exchange=FORMS[form])
        return info_nce_of_rows(*sides) + crd_of_rows(*sides), accuracy_of_rows(sides[0])

    def shape(*dims: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec(BATCH_AXES) if dims else PartitionSpec()
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    ours, theirs = shape(rows, widths[0]), shape(rows, widths[1])
    arguments = (ours, ours, shape(), theirs, theirs, shape(rows, tokens, dtype=jnp.int32), shape(rows))
    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True)).lower(*arguments).compile(), arguments


def largest_array(program: str) -> int:
    """Return the number of elements of the largest array of a compiled program, in HBM, VMEM or a fusion."""
    shapes = set(re.findall(r"\b(?:f32|bf16|s32|u32|pred)\[([\d,]+)\]", program))
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def for_tpu(topology: str, form: str) -> dict[str, Any]:
    """Return the memory that libtpu allocates in HBM for the loss; arrays in VMEM are not counted."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices).reshape(-1, 1), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)
    program, _ = compiled_loss(form, mesh, TPU_ROWS * len(devices), (STUDENT, TEACHER), TEXT)
    memory = program.memory_analysis()
    return {
        "topology": topology,
        "chips": len(devices),
        "form": form,
        "rows_per_chip": TPU_ROWS,
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "largest_array": largest_array(program.as_text()),
    }


def loss_runs(rows: int) -> dict[str, Any]:
    """Return (function without arguments, compiled program) of the loss in each form, on simulated devices."""
    mesh, rng, runs = make_mesh(4, 2), np.random.default_rng(0), {}
    for form in FORMS:
        program, shapes = compiled_loss(form, mesh, rows, (64, 96), 16)
        arguments = [
            jax.device_put(
                rng.normal(size=x.shape).astype(np.float32) / 8
                if x.dtype == jnp.float32
                else rng.integers(0, 9, x.shape, np.int32),
                x.sharding,
            )
            for x in shapes
        ]
        runs[f"loss, {form}"] = (lambda program=program, arguments=arguments: program(*arguments)), program
    return runs


def step_runs(rows: int) -> dict[str, Any]:
    """Return the same for a training step of the preset `tiny`, in one and in four microbatches."""
    config, optimizer, mesh = (
        CLIPConfig.from_open_clip(model_cfg("tiny")),
        make_optimizer(OptimizerConfig(), 9),
        make_mesh(),
    )
    rng, runs = np.random.default_rng(0), {}
    tokens = rng.integers(1, config.text.vocab_size, (rows, config.text.context_length), np.int32)
    images = rng.integers(0, 256, (rows, *config.vision.image_size, 3), np.uint8)
    batch = shard_batch({"image": images, "tokens": tokens, "weight": np.ones(rows, np.float32)}, mesh)
    clip = CLIP(config)
    with jax.set_mesh(mesh):
        state = init_state(clip, optimizer, 0, None, mesh)
        for parts in (1, 4):
            encoders = Encoders(clip, OPENAI_MEAN, OPENAI_STD)
            step = make_train_step(encoders, None, optimizer, LossConfig(), microbatches=parts)
            program = jax.jit(step).lower(state, batch, None).compile()
            runs[f"step, {parts} microbatches"] = (lambda program=program: program(state, batch, None)), program
    return runs


def main() -> int:
    """Print seconds, bytes and ratios, and with --json one object last."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.losses", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=count, default=4096, metavar="N", help="pairs in a batch (default 4096)")
    parser.add_argument("--rounds", type=count, default=9, metavar="N", help="number of rounds (default 9)")
    parser.add_argument("--quick", action="store_true", help="512 pairs and two rounds; under a minute")
    parser.add_argument(
        "--tpu", nargs="+", metavar="TOPOLOGY", help="only compile for these topologies, for example v5e:16x16"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if args.tpu:
        jobs = [(topology, form) for topology in args.tpu for form in FORMS]
        cells = [for_tpu(*job) for job in tqdm(jobs, "compiling", disable=None)]
        for cell in cells:
            print(f"{cell['topology']:12}{cell['form']:10}{cell['temporary_bytes'] / 2**20:>10.1f} MiB of temporaries")
        if args.json:
            print(json.dumps({"tpu": cells}))
        return 0
    if args.quick:
        args.rows, args.rounds = 512, 2
    runs = loss_runs(args.rows) | step_runs(args.rows // 8)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in tqdm(range(-1, args.rounds), "rounds", disable=None):
        for name, (run, _) in runs.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - started)
    print(f"8 simulated devices on {len(os.sched_getaffinity(0))} cores, {args.rows} pairs, {args.rounds} rounds")
    figures = []
    for name, (_, program) in runs.items():
        first = next(other for other in runs if other.partition(",")[0] == name.partition(",")[0])
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[first], strict=True))
        temporary = program.memory_analysis().temp_size_in_bytes
        median = statistics.median(seconds[name])
        figures.append({"name": name, "seconds": median, "ratio": ratio, "temporary_bytes": temporary})
        print(f"{name:24}{median:>9.4f} s{ratio:>8.2f}x{temporary / 2**20:>10.1f} MiB of temporaries per device")
    if args.json:
        print(json.dumps({"rows": args.rows, "devices": "8 simulated", "figures": figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
