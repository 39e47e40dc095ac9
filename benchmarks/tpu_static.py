"""Compiles the packed products for TPUs, without a TPU: `python -m benchmarks.tpu_static [--quick] [--json]`.

libtpu compiles every product of CLIP ViT-B/16 and L/14 ahead of time for v4, v5e, v5p and v6e. The output shows whether
each compiles, the bytes of its weights, and the VLIW bundles of fc1 and fc2 with 1576 rows, against a dense kernel with
the same blocks. Nothing runs, so no figure is a speed. Exits with 1 if a product does not compile or a ratio is over
its target.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from benchmarks import tpu_bundles
from tclip_jax.models.presets import model_cfg
from tclip_jax.ternary.columns import matmul_columns, repack_columns
from tclip_jax.ternary.kernels import kernel
from tclip_jax.ternary.kernels.layout import DEVICES
from tclip_jax.ternary.tensor import TernaryTensor

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
ROWS = (1, 8, 77, 197, 1576, 50432)
TARGETS = {"bf16": 1.3, "int8": 1.2}
GROUP = 256
FC = [(768, 3072), (3072, 768)]  # fc1 and fc2 of ViT-B/16
LARGEST = (4096, 1024)  # fc2 of ViT-L/14, which fills VMEM
# Implementation, activations, dtype of x, and the numbers of rows. XLA takes up to half a minute for int2 with many
# rows. float32 is for comparisons of one image. v4 has A8 only in bf16.
PATHS = (
    ("mosaic_tpu", "A32", jnp.bfloat16, ROWS),
    ("mosaic_tpu", "A32", jnp.float32, (197,)),
    ("mosaic_tpu", "A8", jnp.bfloat16, ROWS),
    ("mosaic_tpu_int8", "A8", jnp.bfloat16, ROWS),
    ("xla_int2", "A32", jnp.bfloat16, (197,)),
    ("xla_int2", "A8", jnp.bfloat16, (197,)),
)


def weight_shapes(presets: tuple[str, ...]) -> list[tuple[int, int]]:
    """Return the distinct (K, N) of qkv, out, fc1 and fc2 of both towers."""
    shapes: dict[tuple[int, int], None] = {}
    for preset in presets:
        for tower in ("vision_cfg", "text_cfg"):
            width = model_cfg(preset)[tower]["width"]
            shapes |= dict.fromkeys([(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)])
    return list(shapes)


def mesh_of(device: str, devices: int) -> Mesh:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[device])
    return Mesh(np.array(topology.devices[:devices]), ("tensor",), axis_types=(AxisType.Auto,))


def ternary(k: int, n: int) -> TernaryTensor:
    """Return an abstract weight with groups of 256."""
    return jax.eval_shape(
        lambda: TernaryTensor(jnp.zeros((k, n), jnp.int8), jnp.zeros((-(-k // GROUP), n)), min(GROUP, k))
    )


def abstract(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def compiled(product: Any, x: Any, w: Any) -> dict[str, Any]:
    """Compile x · ŵ; return seconds, bytes in HBM and collectives, or the first line of the error."""
    start = time.perf_counter()
    try:
        program = jax.jit(product).lower(x, w).compile()
    except Exception as error:
        return {"error": str(error).strip().splitlines()[0]}
    memory: Any = program.memory_analysis()
    return {
        "seconds": time.perf_counter() - start,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": len(re.findall(r" (?:all-|collective-|reduce-)[a-z-]+\(", str(program.as_text()))),
    }


def weight_bytes(product: Any, w: Any, k: int, dtype: Any) -> int:
    """Return the HBM bytes of the weight, which is the only argument of the compiled program."""
    program = jax.jit(lambda w: product(jnp.ones((8, k), dtype), w)).lower(w).compile()
    memory: Any = program.memory_analysis()
    return memory.argument_size_in_bytes


def products(device: str, shapes: list[tuple[int, int]], rows: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Compile every implementation that supports the device, with each shape and number of rows."""
    mesh = mesh_of(device, 1)
    with jax.set_mesh(mesh):
        kind = mesh.devices.flat[0].device_kind
        for name, activations, dtype, path_rows in PATHS:
            module = kernel(name)
            target = {"device_kind": kind, "platform": "tpu", "group": GROUP, "activations": activations, "rows": None}
            product = functools.partial(module.matmul, activations=activations)
            for k, n in shapes:
                reason = module.unsupported(**target, shape=(k, n), dtype=jnp.dtype(dtype))
                if reason or (DEVICES[kind].int8 and (name, activations) == ("mosaic_tpu", "A8")):
                    continue
                w = abstract(jax.eval_shape(module.pack, ternary(k, n)), mesh, PartitionSpec())
                cell: dict[str, Any] = {"device": device, "implementation": name, "activations": activations}
                cell |= {"dtype": jnp.dtype(dtype).name, "k": k, "n": n}
                if (name, dtype) == ("mosaic_tpu_int8" if activations == "A8" else "mosaic_tpu", jnp.bfloat16):
                    cell["weight_bytes"] = weight_bytes(product, w, k, dtype)
                for m in (m for m in rows if m in path_rows):
                    x = abstract(jax.ShapeDtypeStruct((m, k), dtype), mesh, PartitionSpec())
                    yield cell | {"m": m} | compiled(product, x, w)


def shared_columns(device: str, shapes: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """Compile products whose weight is sharded by columns over the four devices of a mesh."""
    mesh = mesh_of(device, 4)
    product = functools.partial(matmul_columns, mesh=mesh, axis="tensor")
    with jax.set_mesh(mesh):
        for k, n in shapes:
            w = jax.eval_shape(lambda w: repack_columns(w, mesh, "tensor", dtype=jnp.bfloat16), ternary(k, n))
            w = abstract(w, mesh, PartitionSpec(None, "tensor"))
            x = abstract(jax.ShapeDtypeStruct((197, k), jnp.bfloat16), mesh, PartitionSpec())
            cell = {"device": f"{device}, 4 devices", "implementation": w.layout, "activations": "A32"}
            yield cell | {"dtype": "bfloat16", "m": 197, "k": k, "n": n} | compiled(product, x, w)


def ratios(device: str, folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yield bundle ratios of fc1 and fc2 of ViT-B/16. This process must have the dump flags."""
    mesh = mesh_of(device, 1)
    layout = DEVICES[mesh.devices.flat[0].device_kind]

    def shard(shape: tuple[int, ...], dtype: Any) -> Any:
        return abstract(jax.ShapeDtypeStruct(shape, dtype), mesh, PartitionSpec())

    with jax.set_mesh(mesh):
        for order in ("bf16", "int8") if layout.int8 else ("bf16",):
            for k, n in FC:
                # In bf16 the scales are folded into the weights at no cost. In int8 they are not.
                for groups in (k // GROUP,) if order == "bf16" else (1, k // GROUP):
                    row = tpu_bundles.compare(layout, order, k, n, groups, shard, folder)
                    if row is None:
                        return
                    yield {"device": device, "target": TARGETS[order]} | row


def child(device: str, quick: bool, dump: str) -> None:
    """Print the rows of one device, each as soon as it is known."""
    shapes = [*FC, LARGEST] if quick else weight_shapes(("ViT-B-16", "ViT-L-14"))
    rows = ratios(device, pathlib.Path(dump)) if dump else products(device, shapes, (1, 197, 1576) if quick else ROWS)
    if device == "v5e" and not dump:
        rows = itertools.chain(rows, shared_columns(device, shapes))
    for row in rows:
        print("row " + json.dumps(row), flush=True)


def spawn(device: str, quick: bool, dump: str = "") -> tuple[list[dict[str, Any]], str]:
    """Return the rows of one device and its failure. A new process isolates an abort in XLA."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    if dump:
        environment["LIBTPU_INIT_ARGS"] = tpu_bundles.dump_flags(dump)
    command = [sys.executable, "-m", "benchmarks.tpu_static", "--child", device, "--dump", dump]
    with tempfile.TemporaryFile("w+") as errors:  # a file, because libtpu writes much to stderr
        process = subprocess.Popen(
            command + ["--quick"] * quick, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdout
        lines = tqdm(process.stdout, desc=device + " bundles" * bool(dump), unit=" products", disable=None)
        rows = [json.loads(line.removeprefix("row ")) for line in lines if line.startswith("row ")]
        if process.wait() == 0:
            return rows, ""
        errors.seek(0)
        return rows, f"{device}: exit code {process.returncode}: {(errors.read().strip().splitlines() or [''])[-1]}"


def print_tables(cells: list[dict[str, Any]], bundles: list[dict[str, Any]]) -> None:
    print("Compiled ahead of time by libtpu; nothing here ran, and no figure is a speed.\n")
    print(f"{'device':<17}{'implementation':<17}{'activations':<13}{'x':<10}{'compiled':>10}{'seconds each':>14}")
    sets: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        sets[tuple(cell[key] for key in ("device", "implementation", "activations", "dtype"))].append(cell)
    for (device, name, activations, dtype), group in sets.items():
        good = [cell for cell in group if "error" not in cell]
        seconds = f"{np.median([cell['seconds'] for cell in good]):.1f}" if good else "-"
        count = f"{len(good)}/{len(group)}"
        print(f"{device:<17}{name:<17}{activations:<13}{dtype:<10}{count:>10}{seconds:>14}")
    for cell in cells:
        if "error" in cell:
            print("{device} {implementation} {activations} M={m} K={k} N={n}: {error}".format(**cell))
    print(f"\n{'K':>5}{'N':>6}{'2-bit bytes':>13}{'with scales':>13}{'of dense bf16':>15}")
    shapes = {
        (cell["k"], cell["n"]): cell["weight_bytes"]
        for cell in cells
        if cell["implementation"] == "mosaic_tpu" and "weight_bytes" in cell
    }
    for (k, n), size in shapes.items():
        print(f"{k:>5}{n:>6}{k * n // 4:>13,}{size:>13,}{100 * size / (2 * k * n):>13.1f} %")
    if not bundles:
        print("\nNo bundles: --quick, or a libtpu that dumps none.")
        return
    print(f"\nBundles for one block of columns, M = {tpu_bundles.ROWS}, against a dense kernel with the same blocks")
    print(
        f"{'device':<8}{'order':<7}{'K':>5}{'N':>6}{'scales/K':>10}{'blocks':>13}{'packed':>9}{'dense':>9}"
        f"{'ratio':>7}{'target':>8}"
    )
    for row in bundles:
        print(
            f"{row['device']:<8}{row['order']:<7}{row['k']:>5}{row['n']:>6}{row['groups']:>10}"
            f"{'x'.join(map(str, row['blocks'])):>13}{row['packed']:>9,}{row['dense']:>9,}"
            f"{row['ratio']:>7.2f}{row['target']:>8}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="only fc1 and fc2 of ViT-B/16 and fc2 of L/14, fewer rows, no bundles"
    )
    parser.add_argument(
        "--devices", nargs="+", choices=TOPOLOGIES, help="devices (default: all; with --quick: v4 and v5e)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--dump", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.quick, arguments.dump)
        return 0
    cells: list[dict[str, Any]] = []
    bundles: list[dict[str, Any]] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for device in arguments.devices or (("v4", "v5e") if arguments.quick else TOPOLOGIES):
            for dump, rows in (("", cells), (folder, bundles)) if not arguments.quick else (("", cells),):
                device_rows, failure = spawn(device, arguments.quick, dump)
                rows += device_rows
                failures += [failure] if failure else []
    print_tables(cells, bundles)
    over = [row for row in bundles if row["ratio"] > row["target"]]
    failed = failures + [f"{cell['device']}: {cell['error']}" for cell in cells if "error" in cell]
    for failure in failures:
        print(failure)
    if arguments.json:
        print(json.dumps({"compiled": cells, "bundles": bundles, "failures": failed}))
    return 1 if failed or over else 0


if __name__ == "__main__":
    sys.exit(main())
