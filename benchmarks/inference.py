"""Speed and memory of packed inference on this CPU, relative to dense float32 in JAX, and open_clip in PyTorch.

python -m benchmarks.inference            about ten minutes
python -m benchmarks.inference --quick    under a minute
python -m benchmarks.inference --quick --json | tail -1

All implementations of a row take turns within one run, so that other load on the machine affects all equally. A ratio
is a ratio of medians; above 1 is faster than dense float32 JAX. A8 includes the quantization of activations.
`--cpu-time` measures processor seconds, which depend less on other load.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from tclip_jax.artifacts.format import read_artifact, write_artifact
from tclip_jax.artifacts.pack import flatten, pack_params, repack_params
from tclip_jax.data.images import Preprocess
from tclip_jax.inference.load import load_model
from tclip_jax.inference.model import Model
from tclip_jax.models.clip import CLIP, init_params, param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import model_cfg
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.numerics.torch_side import import_torch
from tclip_jax.parallel.sharding import path_of
from tclip_jax.ternary import Quantizer, TernaryTensor, repack, ternarize, ternary_matmul
from tclip_jax.ternary.kernels.native_cpu import instruction_sets
from tclip_jax.ternary.tensor import Activations

# (M, K, N): M rows of one text, one image or eight images; K, N of the layers of ViT-B/16.
SHAPES = [
    (1, 768, 3072),
    (8, 768, 3072),
    (77, 512, 2048),
    (77, 2048, 512),
    (197, 768, 768),
    (197, 768, 3072),
    (197, 3072, 768),
    (1576, 768, 2304),
    (1576, 768, 3072),
    (1576, 3072, 768),
]
VARIANTS: tuple[tuple[str, Activations], ...] = (
    ("native_cpu", "A32"),
    ("native_cpu", "A16"),
    ("native_cpu", "A8"),
    ("xla_int8", "A8"),
    ("reference", "A32"),
)

RowStats = list[dict[str, Any]]


def call(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Return a function that calls `function` with the arguments and waits for its result."""
    return lambda: function(*args).block_until_ready()


def take_turns(functions: dict[str, Callable[[], Any]], seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    """Return the median seconds of each function; the functions take turns for `seconds`, at least five times."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(next(iter(times.values()))) < 5:
        for name, function in functions.items():
            start = clock()
            function()
            times[name].append(clock() - start)
    return {name: statistics.median(samples) for name, samples in times.items()}


def ratios(name: str, seconds: dict[str, float], baseline: str) -> dict[str, Any]:
    """Return a row: milliseconds of the baseline, and the speedup of each other function."""
    return {"name": name, "baseline_ms": seconds[baseline] * 1e3} | {
        variant: seconds[baseline] / value for variant, value in seconds.items() if variant != baseline
    }


def matmul_rows(quick: bool, clock: Callable[[], float]) -> RowStats:
    """Return the speedups of every implementation of the product, at the shapes of ViT-B/16, group 256."""
    dot = jax.jit(jnp.dot)
    product = jax.jit(ternary_matmul)
    rows = []
    for m, k, n in SHAPES[::4] if quick else SHAPES:
        w = ternarize(jax.random.normal(jax.random.key(1), (k, n)), Quantizer())
        x, dense = jax.random.normal(jax.random.key(0), (m, k)), w.dequantize()
        functions: dict[str, Callable[[], Any]] = {"dense": call(dot, x, dense)}
        for name, activations in VARIANTS:
            if name == "native_cpu" and not instruction_sets():  # not built; the first line of output reports it
                continue
            packed = jax.device_put(repack(w, implementation=name, activations=activations))
            functions[f"{name} {activations}"] = call(product, x, packed)
        rows.append(ratios(f"{m} x {k} x {n}", take_turns(functions, 1 if quick else 8, clock), "dense"))
    return rows


def encode_rows(quick: bool, clock: Callable[[], float], torch: bool) -> RowStats:
    """Return the speedups of encoding images with random weights."""
    model = _model(quick)
    config = model.config
    encoder = CLIP(config)

    @jax.jit
    def encode(params: Any, pixels: jax.Array) -> Any:
        return encoder.apply({"params": params}, pixels, method="encode_image")

    models = {"dense": jax.device_put(_dense(model))}
    models |= {f"packed {each}": model.repacked(activations=each).params for each in get_args(Activations)}
    rows = []
    for batch in (1, 8):
        pixels = np.random.default_rng(0).standard_normal((batch, *config.vision.image_size, 3)).astype(np.float32)
        functions: dict[str, Callable[[], Any]] = {
            name: call(encode, params, jnp.asarray(pixels)) for name, params in models.items()
        }
        if torch:
            functions |= _torch_encoders(config, pixels)
        rows.append(ratios(f"image encode, batch {batch}", take_turns(functions, 2 if quick else 60, clock), "dense"))
    return rows


def _torch_encoders(config: CLIPConfig, pixels: Any) -> dict[str, Callable[[], Any]]:
    torch = import_torch()
    import open_clip

    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    functions: dict[str, Callable[[], Any]] = {}
    for name, dtype in (("open_clip float32", torch.float32), ("open_clip bfloat16", torch.bfloat16)):
        module = open_clip.CLIP(**config.to_open_clip()).eval().to(dtype)
        inputs = images.to(dtype)

        def run(module: Any = module, inputs: Any = inputs) -> Any:
            with torch.inference_mode():
                return module.encode_image(inputs, normalize=True)

        functions[name] = run
    return functions


def _model(quick: bool) -> Model:
    """Return a random model whose trits are not yet packed for a device."""
    config = CLIPConfig.from_open_clip(model_cfg("tiny" if quick else "ViT-B-16"))
    params = jax.device_get(jax.jit(init_params, static_argnums=0)(CLIP(config), jax.random.key(0)))
    packed = pack_params(params, ternary_rules("Q-ALL", Quantizer()))
    return Model(config, Preprocess(config.vision.image_size), packed)


def _dense(model: Model) -> Any:
    """Return the parameters with dense float32 weights."""
    return jax.tree.map(
        lambda leaf: np.asarray(leaf.dequantize()) if isinstance(leaf, TernaryTensor) else np.asarray(leaf),
        jax.device_get(model.params),
        is_leaf=lambda leaf: isinstance(leaf, TernaryTensor),
    )


def accuracy_row(model: Model) -> dict[str, Any]:
    """Compare embeddings of packed and dense float32 models: max |Δ|, and the smallest cosine.

    Args:
      model: a model whose trits are not yet packed for a device.
    """
    rng = np.random.default_rng(0)
    dense = dataclasses.replace(model, params=_dense(model))
    inputs = {
        "encode_image": rng.standard_normal((8, *model.config.vision.image_size, 3)).astype(np.float32),
        "encode_text": rng.integers(1, model.config.text.vocab_size, (8, model.config.text.context_length)),
    }
    row: dict[str, Any] = {"name": "accuracy"}
    for method, batch in inputs.items():
        expected = getattr(dense, method)(batch)
        for each in get_args(Activations):
            rounded = getattr(model.repacked(activations=each), method)(batch)
            error, cosine = np.abs(rounded - expected).max(), (rounded * expected).sum(axis=1).min()
            row[f"{method} {each}"] = {"max_error": float(error), "least_cosine": float(cosine)}
    return row


def memory_row(quick: bool) -> dict[str, Any]:
    """Return ratios of float32 to packed: bytes of the parameters, and growth of a process that encodes one image."""
    model = _model(quick)
    packed = repack_params(jax.device_get(model.params))
    resident = sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
    with tempfile.TemporaryDirectory() as folder:
        described = {"config": model.config, "preprocess": model.preprocess, "params": model.params, "rules": ()}
        write_artifact(f"{folder}/artifact", **described)
        save_file(
            {path: np.array(leaf) for path, leaf in flatten(_dense(model)).items()}, f"{folder}/dense.safetensors"
        )
        start = time.perf_counter()
        Model.load(f"{folder}/artifact")
        load = time.perf_counter() - start
        growth = {}
        for kind in ("dense", "packed"):
            command = [sys.executable, "-m", "benchmarks.inference", "--growth", f"{folder}/{kind}"]
            growth[kind] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        "name": "memory",
        "weights": 4 * sum(math.prod(leaf.shape) for leaf in flatten(model.params).values()) / resident,
        "packed_bytes": resident,
        "process": growth["dense"] / growth["packed"],
        "growth_bytes": growth,
        "load_seconds": load,
    }


def print_growth(path: pathlib.Path) -> None:
    """Print the bytes by which this process grows when it loads a model and encodes an image."""
    jax.jit(lambda x: x + 1)(np.ones(3)).block_until_ready()
    before = _resident_bytes()
    artifact = read_artifact(path.parent / "artifact") if path.name == "dense" else None
    if artifact is None:
        model = Model.load(path.parent / "artifact", activations="A8")
    else:
        config, preprocess, stored = artifact.config, artifact.preprocess, load_file(path.with_suffix(".safetensors"))
        del artifact
        params = jax.tree_util.tree_map_with_path(lambda key, _: stored[path_of(key)], param_shapes(config))
        model = Model(config, preprocess, params)
        del params, stored
    model.encode_image(np.zeros((1, *model.config.vision.image_size, 3), np.float32))
    gc.collect()
    print(_resident_bytes() - before)


def _resident_bytes() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def print_table(rows: RowStats) -> None:
    """Print one line per row, with the name and value of each ratio."""
    for row in rows:
        numbers = [f"{key} {value:.2f}x" for key, value in row.items() if key not in ("name", "baseline_ms")]
        print(f"{row['name']:24}dense {row['baseline_ms']:9.2f} ms  {'  '.join(numbers)}", flush=True)


def main() -> int:
    """Print the tables, and with --json one object last."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three products and the preset 'tiny'; under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--cpu-time", action="store_true", help="measure processor seconds instead of elapsed seconds")
    parser.add_argument("--encode-only", action="store_true", help="leave out the table of products")
    parser.add_argument("--no-torch", action="store_true", help="leave out open_clip in PyTorch")
    parser.add_argument(
        "--model", metavar="ARTIFACT", help="measure the errors of this model instead of random weights"
    )
    parser.add_argument("--growth", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.growth:
        print_growth(args.growth)
        return 0
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(f"instruction sets of the native kernel: {', '.join(filter(None, instruction_sets())) or 'not built'}")
    matmul = [] if args.encode_only else matmul_rows(args.quick, clock)
    print_table(matmul)
    encode = encode_rows(args.quick, clock, torch=not args.no_torch)
    print_table(encode)
    accuracy = accuracy_row(load_model(args.model) if args.model else _model(args.quick))
    for name, figures in accuracy.items():
        if name != "name":
            print(f"{name:18} max |Δ| {figures['max_error']:.1e}, least cosine {figures['least_cosine']:.6f}")
    memory = memory_row(args.quick)
    print(
        f"float32 / packed: weights {memory['weights']:.2f}x, process {memory['process']:.2f}x; "
        f"load {memory['load_seconds']:.2f} s"
    )
    if args.json:
        print(json.dumps({"matmul": matmul, "encode": encode, "accuracy": accuracy, "memory": memory}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
