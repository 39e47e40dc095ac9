"""One tower in every runtime: load it, time it, and check its embeddings.

`benchmarks.runtimes` starts this module in a new process for every measurement, so that a process holds one runtime:

python -m benchmarks.peers FOLDER RUNTIME    prints one JSON object
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Encode = Callable[[], Array]

CALLS = 5  # timed calls of an encoder, at least
OURS = "tclip_jax"

# What benchmarks.peer_files writes to a folder. LiteRT's files have a fixed batch size.
ARTIFACT, CHECKPOINT, INPUTS = "artifact", "dense.safetensors", "inputs.npz"
ONNX_FLOAT, ONNX_INT8, ONNX_2BIT = "float32.onnx", "int8.onnx", "2bit.onnx"
PACKED_TORCH = "torch/model.safetensors"
LITERT_FLOAT, LITERT_INT8 = "float32-{batch}.tflite", "int8-{batch}.tflite"


class Unsupported(Exception):
    """A runtime cannot compute what it should on this processor."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What every runtime computes.

    Attributes:
      model: name of a preset.
      tower: "image" or "text".
      batches: inputs per call.
      seconds: time for which each batch size is measured.
      files: the files of weights that the runtimes read.
      threads: threads that a runtime may use: as many as this process has processors.
    """

    model: str
    tower: str
    batches: tuple[int, ...]
    seconds: float
    files: tuple[str, ...]
    threads: int = dataclasses.field(default_factory=lambda: len(os.sched_getaffinity(0)))

    def write(self, folder: pathlib.Path) -> None:
        """Write the task to a folder."""
        (folder / "task.json").write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, folder: pathlib.Path) -> Task:
        """Read the task of a folder."""
        fields = json.loads((folder / "task.json").read_text())
        return cls(**fields | {key: tuple(fields[key]) for key in ("batches", "files")})


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A way to run the tower.

    Attributes:
      load: function of (folder, task, inputs, setting). It returns a function that encodes these inputs, which are
        float32 pixels (N, 3, H, W) or int64 tokens (N, T).
      setting: activations, dtype or precision.
      file: name of the weights.
      modules: what must be installed beyond the extra `torch`.
    """

    load: Callable[[pathlib.Path, Task, Array, str], Encode]
    setting: str
    file: str
    modules: tuple[str, ...] = ()


def load_packed(folder: pathlib.Path, task: Task, inputs: Array, setting: str) -> Encode:
    """Load our artifact; `setting` is the kind of its activations."""
    from tclip_jax.inference.model import Model

    activations: Any = setting
    return _jax_encoder(Model.load(folder / ARTIFACT, activations=activations), task, inputs)


def load_dense(folder: pathlib.Path, task: Task, inputs: Array, setting: str) -> Encode:
    """Load dense float32 weights in JAX, where XLA multiplies them."""
    from safetensors.numpy import load_file

    from tclip_jax.data.images import Preprocess
    from tclip_jax.inference.model import Model
    from tclip_jax.interop.open_clip import from_open_clip

    config = model_config(task.model)
    params = from_open_clip(load_file(folder / CHECKPOINT), config)
    return _jax_encoder(Model(config, Preprocess(config.vision.image_size), params), task, inputs)


def _jax_encoder(model: Any, task: Task, inputs: Array) -> Encode:
    import jax
    import jax.numpy as jnp

    apply = jax.jit(model.apply_image if task.tower == "image" else model.apply_text)
    batch = jnp.asarray(inputs.transpose(0, 2, 3, 1) if task.tower == "image" else inputs)
    return lambda: np.asarray(apply(model.params, batch))


def load_torch(folder: pathlib.Path, task: Task, inputs: Array, setting: str) -> Encode:
    """Load open_clip's module in PyTorch; `setting` is its dtype."""
    from tclip_jax.numerics.torch_side import import_torch

    torch = import_torch()
    torch.set_num_threads(task.threads)
    dtype = getattr(torch, setting)
    module, batch = torch_tower(folder, task).to(dtype), torch.from_numpy(inputs)
    if batch.is_floating_point():
        batch = batch.to(dtype)

    def encode() -> Array:
        with torch.inference_mode():
            return module(batch).float().numpy()

    return encode


def load_tclip_torch(folder: pathlib.Path, task: Task, inputs: Array, setting: str) -> Encode:
    """Load the folder of `tclip export --to torch`; `setting` is the kind of its activations.

    Raises:
      Unsupported: the native kernel is missing.
    """
    import torch

    from tclip_torch import linear, load

    torch.set_num_threads(task.threads)
    # The library of tclip_jax has the kernel too.
    library = pathlib.Path(__file__).resolve().parents[1] / "tclip_jax" / "ternary" / "native" / "libternary_cpu.so"
    os.environ.setdefault("TCLIP_TORCH_LIBRARY", str(library))
    if linear.kernel() is None:
        raise Unsupported("the native kernel was not built")
    model, batch = load((folder / PACKED_TORCH).parent, setting), torch.from_numpy(inputs)
    encode = model.encode_image if task.tower == "image" else model.encode_text

    def call() -> Array:
        with torch.inference_mode():
            return encode(batch).numpy()

    return call


def torch_tower(folder: pathlib.Path, task: Task) -> Any:
    """Return a float32 PyTorch module that maps pixels (N, 3, H, W) or tokens (N, T) to normalised embeddings."""
    from tclip_jax.numerics.torch_side import import_torch

    torch = import_torch()
    import open_clip
    from safetensors.torch import load_file

    base: Any = torch.nn.Module
    clip = open_clip.CLIP(**model_config(task.model).to_open_clip())
    clip.load_state_dict(load_file(folder / CHECKPOINT))

    class Tower(base):
        def __init__(self) -> None:
            super().__init__()
            self.clip = clip

        def forward(self, inputs: Any) -> Any:
            return getattr(self.clip, f"encode_{task.tower}")(inputs, normalize=True)

    return Tower().eval()


def load_onnxruntime(folder: pathlib.Path, task: Task, inputs: Array, setting: str) -> Encode:
    """Load the ONNX file `setting` in ONNX Runtime. Its graph optimizer gets a fixed batch size."""
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = task.threads, 1
    options.add_free_dimension_override_by_name("batch", len(inputs))
    session = onnxruntime.InferenceSession(folder / setting, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"inputs": inputs})[0]


def load_openvino(folder: pathlib.Path, task: Task, inputs: Array, setting: str) -> Encode:
    """Load an ONNX file in OpenVINO; `setting` is a precision and the file, as in "bf16 float32.onnx".

    Raises:
      Unsupported: OpenVINO chose another precision for this processor.
    """
    openvino = importlib.import_module("openvino")
    precision, file = setting.split()
    core = openvino.Core()
    model = core.read_model(folder / file)
    model.reshape(inputs.shape)  # with a dynamic batch size 2-bit products give empty results (OpenVINO 2026.4)
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": task.threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(model, "CPU", options)
    used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if used != precision:
        raise Unsupported(f"OpenVINO computes in {used} on this processor, not in {precision}")
    return lambda: compiled([inputs], share_inputs=True)[0]


def load_litert(folder: pathlib.Path, task: Task, inputs: Array, setting: str) -> Encode:
    """Load a file of this batch size in LiteRT; `setting` is its pattern."""
    litert = importlib.import_module("ai_edge_litert.interpreter")
    interpreter = litert.Interpreter(str(folder / setting.format(batch=len(inputs))), num_threads=task.threads)
    interpreter.allocate_tensors()
    (given,), (found,) = interpreter.get_input_details(), interpreter.get_output_details()
    batch = inputs.astype(given["dtype"])

    def encode() -> Array:
        interpreter.set_tensor(given["index"], batch)
        interpreter.invoke()
        return interpreter.get_tensor(found["index"])

    return encode


_ORT, _OPENVINO = ("onnxruntime", "onnx", "onnxscript"), ("openvino", "onnx", "onnxscript")
_LITERT = ("ai_edge_litert", "litert_torch", "ai_edge_quantizer")
PEERS = {
    "JAX float32 (XLA)": Runtime(load_dense, "", CHECKPOINT),
    "PyTorch float32": Runtime(load_torch, "float32", CHECKPOINT),
    "PyTorch bfloat16": Runtime(load_torch, "bfloat16", CHECKPOINT),
    **{f"tclip_torch {kind}": Runtime(load_tclip_torch, kind, PACKED_TORCH) for kind in ("A32", "A16", "A8")},
    "ONNX Runtime float32": Runtime(load_onnxruntime, ONNX_FLOAT, ONNX_FLOAT, _ORT),
    "ONNX Runtime int8": Runtime(load_onnxruntime, ONNX_INT8, ONNX_INT8, _ORT),
    "ONNX Runtime 2-bit": Runtime(load_onnxruntime, ONNX_2BIT, ONNX_2BIT, _ORT),
    "OpenVINO float32": Runtime(load_openvino, f"f32 {ONNX_FLOAT}", ONNX_FLOAT, _OPENVINO),
    "OpenVINO bfloat16": Runtime(load_openvino, f"bf16 {ONNX_FLOAT}", ONNX_FLOAT, _OPENVINO),
    "OpenVINO 2-bit": Runtime(load_openvino, f"f32 {ONNX_2BIT}", ONNX_2BIT, _OPENVINO),
    "LiteRT float32": Runtime(load_litert, LITERT_FLOAT, LITERT_FLOAT, _LITERT),
    "LiteRT int8": Runtime(load_litert, LITERT_INT8, LITERT_INT8, _LITERT),
}


def runtime(name: str) -> Runtime:
    """Return a runtime by its name: one of `PEERS`, or "tclip_jax A8" for ours with these activations."""
    return PEERS.get(name) or Runtime(load_packed, name.removeprefix(f"{OURS} "), ARTIFACT)


def missing(modules: tuple[str, ...]) -> list[str]:
    """Return the modules that are not installed."""
    return [module for module in modules if importlib.util.find_spec(module) is None]


def model_config(model: str) -> Any:
    """Return the shape of a preset, a `CLIPConfig`."""
    from tclip_jax.models.config import CLIPConfig
    from tclip_jax.models.presets import model_cfg

    return CLIPConfig.from_open_clip(model_cfg(model))


def measure(folder: pathlib.Path, chosen: Runtime) -> list[dict[str, float]]:
    """Load the tower and encode, for each batch size in turn.

    Returns:
      For each batch size the least and the median milliseconds of a call. Against the embeddings in float64: the
      largest difference and the least cosine.
    """
    task, stored = Task.read(folder), np.load(folder / INPUTS)
    rows = []
    for batch in task.batches:
        expected = stored["expected"][:batch]
        encode = chosen.load(folder, task, np.ascontiguousarray(stored["inputs"][:batch]), chosen.setting)
        embeddings = encode()
        encode()
        times: list[float] = []
        end = time.monotonic() + task.seconds
        while time.monotonic() < end or len(times) < CALLS:
            start = time.perf_counter()
            encode()
            times.append(1e3 * (time.perf_counter() - start))
        rows.append(
            {
                "batch": batch,
                "least_ms": min(times),
                "median_ms": statistics.median(times),
                "max_error": float(np.abs(embeddings - expected).max()),
                "least_cosine": least_cosine(embeddings, expected),
            }
        )
    return rows


def least_cosine(embeddings: Array, expected: Array) -> float:
    """Return the least cosine of corresponding rows, which low precisions do not normalise exactly."""
    products = (embeddings * expected).sum(axis=1, dtype=np.float64)
    lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1) * np.linalg.norm(expected, axis=1)
    return float((products / lengths).min())


def processor_flags() -> set[str]:
    """Return the instruction sets of the processor in Linux's names; empty on other systems."""
    file = pathlib.Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()[2:]}


if __name__ == "__main__":
    try:
        print(json.dumps({"rows": measure(pathlib.Path(sys.argv[1]), runtime(sys.argv[2]))}))
    except Unsupported as error:
        print(json.dumps({"unsupported": str(error)}))
