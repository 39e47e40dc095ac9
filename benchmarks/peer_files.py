"""The files of one model for every runtime, with the same ternary weights (Q-ALL) in each.

`benchmarks.runtimes` starts this module in a process of its own, whose memory is then free for the measurements:

python -m benchmarks.peer_files FOLDER    writes the files that FOLDER/task.json names, and prints their sizes as JSON
"""

from __future__ import annotations

import importlib
import json
import math
import pathlib
import sys
import warnings
from typing import Any

import numpy as np
from etils import epath
from safetensors.numpy import save_file

from benchmarks.peers import (
    ARTIFACT,
    CHECKPOINT,
    INPUTS,
    LITERT_FLOAT,
    LITERT_INT8,
    ONNX_2BIT,
    ONNX_FLOAT,
    ONNX_INT8,
    PACKED_TORCH,
    Array,
    Task,
    model_config,
    processor_flags,
    torch_tower,
)
from tclip_jax.artifacts import pack_params, read_artifact, write_artifact
from tclip_jax.artifacts.files import WEIGHT_FILES
from tclip_jax.artifacts.safetensors import read_safetensors
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.open_clip import from_open_clip, to_open_clip
from tclip_jax.interop.torch_packed import write_torch
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.numerics.torch_side import import_torch
from tclip_jax.ternary import Quantizer

BLOCK = 128  # inputs that share a scale in a 2-bit file: ONNX Runtime multiplies larger blocks in float32


def write_files(folder: pathlib.Path) -> None:
    """Write everything that the task of a folder needs: weights, inputs with their exact embeddings, foreign files."""
    task = Task.read(folder)
    import_torch().set_num_threads(task.threads)
    write_weights(folder, task.model)
    write_inputs(folder, task)
    if PACKED_TORCH in task.files:
        write_packed_torch(folder)
    tower = torch_tower(folder, task)
    if any(file.endswith(".onnx") for file in task.files):
        write_onnx(folder, task, tower)
    if any(file.endswith(".tflite") for file in task.files):
        write_litert(folder, task, tower)


def write_weights(folder: pathlib.Path, model: str) -> None:
    """Write open_clip's random model, ternarized, as our artifact, and dequantized as a float32 state dict."""
    torch, config, rules = import_torch(), model_config(model), ternary_rules("Q-ALL", Quantizer())
    import open_clip

    torch.manual_seed(0)
    module = open_clip.CLIP(**config.to_open_clip())
    latent = from_open_clip({name: each.detach().numpy() for name, each in module.named_parameters()}, config)
    preprocess = Preprocess(config.vision.image_size)
    packed = pack_params(latent, rules)
    write_artifact(folder / ARTIFACT, config=config, preprocess=preprocess, params=packed, rules=rules)
    # The artifact rounds a few float parameters.
    save_file(to_open_clip(read_artifact(folder / ARTIFACT).params, config), folder / CHECKPOINT)


def write_packed_torch(folder: pathlib.Path) -> None:
    """Write the artifact as `tclip export --to torch` does."""
    own = read_artifact(folder / ARTIFACT)
    target = epath.Path(folder / PACKED_TORCH).parent
    write_torch(target, config=own.config, preprocess=own.preprocess, params=own.params)


def write_inputs(folder: pathlib.Path, task: Task) -> None:
    """Write random inputs for the largest batch, and their embeddings by PyTorch in float64."""
    torch, config, rng = import_torch(), model_config(task.model), np.random.default_rng(0)
    count, text = max(task.batches), config.text
    inputs: Array = rng.integers(1, text.vocab_size, (count, text.context_length))
    if task.tower == "image":
        inputs = rng.standard_normal((count, 3, *config.vision.image_size)).astype(np.float32)
    batch = torch.from_numpy(inputs)
    with torch.inference_mode():
        exact = torch_tower(folder, task).double()(batch.double() if batch.is_floating_point() else batch)
    np.savez(folder / INPUTS, inputs=inputs, expected=exact.numpy())


def write_onnx(folder: pathlib.Path, task: Task, tower: Any) -> None:
    """Export a PyTorch module to ONNX with a batch size named "batch", and quantize it if the task names such files."""
    torch, onnx = import_torch(), importlib.import_module("onnx")
    torch.onnx.export(
        tower,
        (torch.from_numpy(np.repeat(np.load(folder / INPUTS)["inputs"][:1], 2, axis=0)),),  # 1 would become constant
        folder / ONNX_FLOAT,
        input_names=["inputs"],
        output_names=["embeddings"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )
    if ONNX_2BIT in task.files:
        onnx.save(two_bit(onnx.load(folder / ONNX_FLOAT)), folder / ONNX_2BIT)
    if ONNX_INT8 in task.files:
        quantization = importlib.import_module("onnxruntime.quantization")
        # The convolution of the patch embedding stays float32, as in ours. Without VNNI or its like, sums of two
        # products saturate in int16, so that ONNX Runtime's documentation asks for weights of 7 bits.
        exact_sums = any("vnni" in flag for flag in processor_flags()) or "asimddp" in processor_flags()
        quantization.quantize_dynamic(
            folder / ONNX_FLOAT,
            folder / ONNX_INT8,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            reduce_range=not exact_sums,
            weight_type=quantization.QuantType.QInt8,
        )


def two_bit(model: Any) -> Any:
    """Replace the products with ternary weights in an ONNX model by `com.microsoft::MatMulNBits` of 2 bits.

    The weights stay exact. `accuracy_level` 4 lets ONNX Runtime round activations to int8, as its fast kernel needs.
    """
    onnx = importlib.import_module("onnx")
    helper, numpy_helper, graph = onnx.helper, onnx.numpy_helper, model.graph
    weights = {each.name: each for each in graph.initializer}
    nodes, replaced = [], set()
    for node in graph.node:
        name = node.input[1] if node.op_type in ("MatMul", "Gemm") else ""
        matrix: Array = numpy_helper.to_array(weights[name]) if name in weights else np.empty(0)
        rows = matrix if any(each.name == "transB" and each.i for each in node.attribute) else matrix.T
        packed = two_bit_codes(rows) if rows.ndim == 2 else None
        if packed is None:
            nodes.append(node)
            continue
        inputs = [node.input[0], f"{name}.codes", f"{name}.scales"]
        if name not in replaced:
            graph.initializer.extend(map(numpy_helper.from_array, packed, inputs[1:]))
            replaced.add(name)
        bias = list(node.input[2:])
        product = f"{node.output[0]}.product" if bias else node.output[0]
        shape = {"N": rows.shape[0], "K": rows.shape[1], "bits": 2, "block_size": BLOCK, "accuracy_level": 4}
        nodes.append(helper.make_node("MatMulNBits", inputs, [product], domain="com.microsoft", **shape))
        if bias:
            nodes.append(helper.make_node("Add", [product, *bias], list(node.output)))
    for name in replaced:
        graph.initializer.remove(weights[name])
    del graph.node[:]
    graph.node.extend(nodes)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def two_bit_codes(weight: Array) -> tuple[Array, Array] | None:
    """Return the 2-bit codes of a ternary matrix in blocks of 128 inputs, or None for other matrices.

    Args:
      weight: floats (N, K).

    Returns:
      Codes trit + 2, four in a byte, low bits first: uint8 (N, blocks, 32). Scales float32 (N, blocks).
    """
    blocks = math.ceil(weight.shape[1] / BLOCK)
    padded = np.pad(weight, ((0, 0), (0, blocks * BLOCK - weight.shape[1]))).reshape(len(weight), blocks, BLOCK)
    scales = np.abs(padded).max(axis=2)
    if not np.all((padded == 0) | (np.abs(padded) == scales[..., None])):
        return None
    codes = (np.sign(padded) + 2).astype(np.uint8).reshape(len(weight), blocks, BLOCK // 4, 4)
    return np.bitwise_or.reduce(codes << np.arange(0, 8, 2, dtype=np.uint8), axis=3), scales


def write_litert(folder: pathlib.Path, task: Task, tower: Any) -> None:
    """Convert a PyTorch module to LiteRT for each batch size: float32, and int8 with dynamic activations."""
    torch, litert = import_torch(), importlib.import_module("litert_torch")
    quantizer = importlib.import_module("ai_edge_quantizer.quantizer")
    recipe = importlib.import_module("ai_edge_quantizer.recipe").dynamic_wi8_afp32()
    inputs = np.load(folder / INPUTS)["inputs"]
    narrow = inputs.astype(np.int32) if inputs.dtype == np.int64 else inputs  # LiteRT has no argmax of int64
    for batch in task.batches:
        file = folder / LITERT_FLOAT.format(batch=batch)
        litert.convert(tower, (torch.from_numpy(narrow[:batch]),)).export(str(file))
        if LITERT_INT8 in task.files:
            quantized = quantizer.Quantizer(str(file), recipe).quantize()
            quantized.export_model(str(folder / LITERT_INT8.format(batch=batch)))


def weight_bytes(folder: pathlib.Path, task: Task, file: str) -> int:
    """Return the bytes of the tower's weights in a file; ONNX's and LiteRT's include the graph.

    Args:
      folder: the folder of the files.
      task: what they were written for.
      file: a name of `task.files`.
    """
    if file.endswith((".onnx", ".tflite")):
        return (folder / file.format(batch=task.batches[0])).stat().st_size
    names = [f"{ARTIFACT}/{name}" for name in WEIGHT_FILES] if file == ARTIFACT else [file]
    tensors = [item for name in names for item in read_safetensors(folder / name).items()]
    return sum(
        math.prod(tensor.shape) * tensor.dtype.itemsize
        for name, tensor in tensors
        if name.startswith(("image/", "visual.")) == (task.tower == "image")
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the exporters warn of their own internals
    target = pathlib.Path(sys.argv[1])
    write_files(target)
    wanted = Task.read(target)
    print(json.dumps({file: weight_bytes(target, wanted, file) for file in wanted.files}))
