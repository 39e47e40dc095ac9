"""The image tower of an exported model in the runtime that the file is for.

`benchmarks.deploy` starts this module in a new process for every measurement:

python -m benchmarks.deploy_runtimes FOLDER NAME    prints one JSON object
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.peers import (
    ARTIFACT,
    CHECKPOINT,
    Array,
    Encode,
    Runtime,
    Task,
    Unsupported,
    load_packed,
    load_tclip_torch,
    load_torch,
    measure,
)


def _normalized(run: Callable[[], Array]) -> Encode:
    def encode() -> Array:
        embeddings = run()
        return embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)

    return encode


def load_onnx(folder: pathlib.Path, task: Task, inputs: Array, setting: str) -> Encode:
    """Load the file `setting` in ONNX Runtime."""
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = task.threads, 1
    session = onnxruntime.InferenceSession(folder / setting, options, providers=["CPUExecutionProvider"])
    return _normalized(lambda: session.run(None, {"pixel_values": inputs})[0])


def load_openvino(folder: pathlib.Path, task: Task, inputs: Array, setting: str) -> Encode:
    """Load the ONNX file `setting` in OpenVINO, with static shapes."""
    openvino = importlib.import_module("openvino")
    model = openvino.Core().read_model(folder / setting)
    model.reshape(inputs.shape)
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": task.threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(model, "CPU", options)
    return _normalized(lambda: compiled([inputs], share_inputs=True)[0])


def load_litert(folder: pathlib.Path, task: Task, inputs: Array, setting: str) -> Encode:
    """Load the file `setting` in LiteRT."""
    litert = importlib.import_module("ai_edge_litert.interpreter")
    run = litert.Interpreter(str(folder / setting), num_threads=task.threads).get_signature_runner()
    batch = np.ascontiguousarray(inputs.transpose(0, 2, 3, 1))
    return _normalized(lambda: run(pixel_values=batch)["image_embeds"])


def load_stablehlo(folder: pathlib.Path, task: Task, inputs: Array, setting: str) -> Encode:
    """Load the programs by the export's own load.py, which imports jax alone."""
    spec: Any = importlib.util.spec_from_file_location("load", folder / setting / "load.py")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    image, _ = module.load()
    batch = np.ascontiguousarray(inputs.transpose(0, 2, 3, 1))
    return lambda: np.asarray(image(batch))


def load_exported_torch(folder: pathlib.Path, task: Task, inputs: Array, setting: str) -> Encode:
    """Load the packed model in PyTorch; `setting` is the kind of its activations."""
    return load_tclip_torch(folder / "torch", task, inputs, setting)


_Q2, _Q2F16, _FP32 = (
    "onnx/onnx/vision_model_q2.onnx",
    "onnx16/onnx/vision_model_q2f16.onnx",
    "fp32/onnx/vision_model.onnx",
)
_LITERT = "litert/litert/image.tflite"
_ONNX = ("onnx", "onnxruntime")
# Ours first, beside which the others stand, then PyTorch's float32, which needs no export, then the exports.
RUNTIMES = {
    "tclip_jax A8": Runtime(load_packed, "A8", ARTIFACT),
    "tclip_jax A16": Runtime(load_packed, "A16", ARTIFACT),
    "PyTorch float32": Runtime(load_torch, "float32", CHECKPOINT),
    "onnx in ONNX Runtime": Runtime(load_onnx, _Q2, _Q2, _ONNX),
    "onnx --dtype float16 in ONNX Runtime": Runtime(load_onnx, _Q2F16, _Q2F16, _ONNX),
    "onnx in OpenVINO": Runtime(load_openvino, _Q2, _Q2, ("onnx", "openvino")),
    "onnx-fp32 in ONNX Runtime": Runtime(load_onnx, _FP32, _FP32, _ONNX),
    "onnx-fp32 in OpenVINO": Runtime(load_openvino, _FP32, _FP32, ("onnx", "openvino")),
    "litert in ai-edge-litert": Runtime(load_litert, _LITERT, _LITERT, ("ai_edge_litert", "litert_converter")),
    "torch in PyTorch, A8": Runtime(load_exported_torch, "A8", "torch/torch/model.safetensors"),
    "torch in PyTorch, A16": Runtime(load_exported_torch, "A16", "torch/torch/model.safetensors"),
    "stablehlo in jax": Runtime(load_stablehlo, "stablehlo/stablehlo", "stablehlo/stablehlo/weights.safetensors"),
}


if __name__ == "__main__":
    try:
        print(json.dumps({"rows": measure(pathlib.Path(sys.argv[1]), RUNTIMES[sys.argv[2]])}))
    except Unsupported as error:
        print(json.dumps({"unsupported": str(error)}))
