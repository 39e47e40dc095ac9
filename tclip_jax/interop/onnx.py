"""Write a CLIP as one ONNX file a tower, with 2-, 4- and 8-bit weights that runtimes keep packed, and verify the files.

Names of files, inputs and outputs are those of optimum and transformers.js. The metadata of a file have the
configuration, the preprocessing and the logit scale, so each file describes itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.artifacts.manifest import refuse_constant
from tclip_jax.artifacts.pack import flatten
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.examples import Examples
from tclip_jax.interop.metadata import Metadata, parse_open_clip
from tclip_jax.interop.onnx_blocks import BLOCKS, WIDTHS, Blocks, code_bits, decode_blocks
from tclip_jax.interop.onnx_graph import CONTRIB, IR_VERSION, OPSET, OUTPUTS, Form, build_tower, layer, onnx_package
from tclip_jax.interop.onnx_session import run_onnx, runtime_version
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.schema import check_names
from tclip_jax.storage import write_atomic
from tclip_jax.ternary import QuantizedTensor

FILES = {"image": "vision_model", "text": "text_model"}
# Protobuf, in which ONNX stores a file, holds 2 GiB. The graph without its weights is below 1 MiB.
_MAX_BYTES = 2**31 - 2**20
# Largest difference and smallest cosine of embeddings: products in float32, and with activations rounded to int8.
MAX_ERROR, MIN_COSINE = 1e-5, 0.9995
_PRODUCTS = ("MatMulNBits", "GatherBlockQuantized")
_CONFIG, _LOGIT_SCALE = "open_clip_config", "logit_scale"


class QuantizedNode(NamedTuple):
    """A packed weight in a file.

    Attributes:
      integers: trits or integers, int8 (N, K), one row for each output; (V, W) for a table.
      bits: of a code, 2 for trits.
      scale: the scale of each of them, float32 in the same shape.
      accuracy_level: of the product; None for a table.
    """

    integers: npt.NDArray[np.int8]
    bits: int
    scale: npt.NDArray[np.float32]
    accuracy_level: int | None


def file_name(tower: str, form: Form) -> str:
    """Return the name of a tower's file, such as "vision_model_q2.onnx"."""
    return f"{FILES[tower]}{form.suffix}.onnx"


def write_onnx(
    folder: epath.PathLike, *, config: CLIPConfig, preprocess: Preprocess, params: Mapping[str, Any], form: Form
) -> None:
    """Write both towers of a model into a folder, each file atomically. Equal arguments give equal bytes.

    Args:
      folder: an existing folder, local or remote (gs://).
      config: the model.
      preprocess: the preprocessing of its images, for the metadata.
      params: parameter tree with `QuantizedTensor` leaves; other leaves may be lazy.
      form: how weights are stored.

    Raises:
      ValueError: the parameters do not match `config`; `form` is packed and no parameter is quantized or has its bits,
        or groups or scales do not fit; a weight is not finite in the dtype; a tower exceeds 2 GiB; or the onnx package
        is missing.
    """
    leaves = flatten(params)
    check_leaves(leaves, config)
    if form.packed and fewest_bits(params) != form.bits:
        if fewest_bits(params) is None:
            raise ValueError(
                "no parameter is quantized: onnx packs trits and integers; onnx-fp32 and onnx-fp16 write float weights"
            )
        raise ValueError(f"the fewest bits of a weight are {fewest_bits(params)}: form.bits is {form.bits}")
    onnx = onnx_package()
    described = {"model_cfg": config.to_open_clip(), "preprocess_cfg": preprocess.to_open_clip()}
    metadata = {_CONFIG: json.dumps(described), _LOGIT_SCALE: repr(float(np.exp(np.asarray(leaves["logit_scale"]))))}
    for tower in FILES:
        graph = build_tower(tower, config, leaves, form)
        size = sum(tensor.ByteSize() for tensor in graph.initializer)
        if size > _MAX_BYTES:
            raise ValueError(f"the {tower} tower has {size:,} bytes: an ONNX file holds {_MAX_BYTES:,}")
        model = onnx.helper.make_model(
            graph,
            producer_name="tclip_jax",
            opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(CONTRIB, 1)],
            ir_version=IR_VERSION,
        )
        onnx.helper.set_model_props(model, metadata)
        onnx.checker.check_model(model)
        write_atomic(epath.Path(folder) / file_name(tower, form), model.SerializeToString(deterministic=True))


def fewest_bits(params: Mapping[str, Any]) -> int | None:
    """Return the fewest bits of a quantized parameter, 2 for a trit; None if all are floats."""
    return min(
        (code_bits(leaf) for leaf in flatten(params).values() if isinstance(leaf, QuantizedTensor)), default=None
    )


def check_leaves(leaves: Mapping[str, Any], config: CLIPConfig) -> None:
    """Raise ValueError unless the parameters have the names and shapes of the model."""
    shapes = {path: leaf.shape for path, leaf in flatten(param_shapes(config)).items()}
    check_names(leaves, shapes, "the parameter tree")
    for path, shape in shapes.items():
        matrix = (int(np.prod(shape[:3])), *shape[3:]) if len(shape) == 4 else shape
        if np.shape(leaves[path]) != (matrix if isinstance(leaves[path], QuantizedTensor) else shape):
            raise ValueError(f"{path} has shape {np.shape(leaves[path])}: the model's is {shape}")


def verify_onnx(folder: epath.PathLike, config: CLIPConfig, params: Mapping[str, Any], form: Form) -> None:
    """Read the files of a folder again, and compare them with what was written: trits, integers, scales, and the
    attributes of the nodes that onnx.checker does not know.

    Raises:
      ValueError: a file is damaged, or something differs; the message names the file and the first weight.
    """
    for tower in FILES:
        path = epath.Path(folder) / file_name(tower, form)
        nodes, expected = read_quantized(path), dict[str, QuantizedTensor]()
        for name, leaf in flatten(params).items():
            if form.packed and name.startswith(f"{tower}/") and isinstance(leaf, QuantizedTensor):
                expected |= _by_layer(name, leaf)
        try:
            _check_blocks(path, tower, config)
            check_names(nodes, expected, "the list of packed weights")
            for name, leaf in expected.items():
                if not _same(nodes[name], leaf):
                    raise ValueError(f"{name} differs from the given parameters")
                if nodes[name].accuracy_level not in (None, form.accuracy_level):
                    raise ValueError(
                        f"{name} has accuracy_level {nodes[name].accuracy_level}, not {form.accuracy_level}"
                    )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _check_blocks(path: epath.Path, tower: str, config: CLIPConfig) -> None:
    """Raise ValueError unless the file has the attention and the activation of every block, with their attributes."""
    shape, found = config.vision if tower == "image" else config.text, list[tuple[str, dict[str, Any]]]()
    for node in parse_onnx(path).graph.node:
        if node.domain == CONTRIB and node.op_type not in _PRODUCTS:
            attributes = {each.name: round(each.f, 4) if each.type == each.FLOAT else each.i for each in node.attribute}
            found.append((node.op_type, attributes))
    causal = int(tower == "text" and not config.text.no_causal_mask)
    block: list[tuple[str, dict[str, Any]]]
    block = [("MultiHeadAttention", {"num_heads": shape.heads, "unidirectional": causal})]
    block += [("QuickGelu", {"alpha": 1.702})] * config.quick_gelu
    pool = tower == "image" and config.vision.pool_type == "map"
    if found != block * (shape.layers + pool):
        raise ValueError(f"its attentions and activations are not {shape.layers} times {block}")


def verify_embeddings(folder: epath.PathLike, form: Form, examples: Examples) -> str:
    """Run both towers in ONNX Runtime and compare their embeddings, normalised, with those of JAX.

    Args:
      folder: the folder with the files.
      form: the form of the files.
      examples: inputs and embeddings, made with weights rounded to `form.dtype`.

    Returns:
      The result in one line; it says so if ONNX Runtime is not installed, and nothing was run.

    Raises:
      ValueError: the embeddings differ too much, or ONNX Runtime is too old for 2-bit products.
    """
    version, names = runtime_version(packed=form.packed), " and ".join(file_name(tower, form) for tower in FILES)
    if version is None:
        return f"{names}: not run, because onnxruntime is not installed; trits and scales were read back"
    error, cosine, exact = 0.0, 1.0, not form.packed or form.accuracy_level == 1
    for tower, expected in (("image", examples.image), ("text", examples.text)):
        inputs = {"image": examples.pixels, "text": examples.tokens}[tower]
        file = (epath.Path(folder) / file_name(tower, form)).read_bytes()
        (found,) = run_onnx(file, tower, inputs, [OUTPUTS[tower]])
        found = found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)
        error = max(error, float(np.abs(found - expected).max()))
        cosine = min(cosine, float((found * expected).sum(axis=-1).min()))
    line = f"{names}: embeddings differ by at most {error:.1e} from JAX's, cosine {cosine:.5f} (onnxruntime {version})"
    if not (error <= MAX_ERROR if exact else cosine >= MIN_COSINE):
        budget = (
            f"the difference must be at most {MAX_ERROR:g}" if exact else f"the cosine must be {MIN_COSINE} or more"
        )
        raise ValueError(f"{line}: {budget}" + ("" if exact else "; --accuracy-level 1 does not round activations"))
    if not exact and error <= MAX_ERROR:
        line += (
            f", which has no {form.bits}-bit product for this CPU and expands the weights to floats: newer versions may"
        )
    return line


def read_metadata(path: epath.PathLike) -> tuple[Metadata, float]:
    """Return configuration and preprocessing of the model of which a file holds a tower, and its logit scale.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is damaged, or was not written by `write_onnx`.
    """
    props = {item.key: item.value for item in parse_onnx(path).metadata_props}
    try:
        document = json.loads(props[_CONFIG], parse_constant=refuse_constant)
        return parse_open_clip(_CONFIG, document["model_cfg"], document["preprocess_cfg"]), float(props[_LOGIT_SCALE])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not state a model of tclip_jax: {error!r:.200}") from None


def read_quantized(path: epath.PathLike) -> dict[str, QuantizedNode]:
    """Return the packed weights of a file by the path of the parameter, with the layer's index after "blocks".

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is damaged, or a packed weight has attributes or a layout that `write_onnx` does not write.
    """
    graph = parse_onnx(path).graph
    tensors, casts = {tensor.name: tensor for tensor in graph.initializer}, dict[str, str]()
    for node in graph.node:
        if node.op_type == "Cast" and len(node.input) == len(node.output) == 1:
            casts[node.output[0]] = node.input[0]
    nodes = {}
    for node in graph.node:
        if node.domain == CONTRIB and node.op_type in _PRODUCTS:
            try:
                if node.name in nodes:
                    raise ValueError("the name is duplicated")
                nodes[node.name] = _read_node(node, tensors, casts)
            except ValueError as error:
                raise ValueError(f"{path}: {node.name!r:.80}: {error}") from None
    return nodes


def parse_onnx(path: epath.PathLike) -> Any:
    """Return the `onnx.ModelProto` of a file.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is not ONNX, is damaged, or has data in other files.
    """
    onnx, path = onnx_package(), epath.Path(path)
    content = path.read_bytes()
    try:
        model = onnx.ModelProto.FromString(content)
        outside = [tensor.name for tensor in model.graph.initializer if tensor.data_location]
        if outside:  # the checker would look for the file
            raise ValueError(f"the data of {outside[0]!r:.80} is in another file")
        onnx.checker.check_model(model)
    # DecodeError of protobuf and ValidationError of onnx have no common base but Exception.
    except Exception as error:
        words = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not an ONNX file, or a damaged one: {words}") from None
    return model


def _read_node(node: Any, tensors: Mapping[str, Any], casts: Mapping[str, str]) -> QuantizedNode:
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    table, inputs = node.op_type == "GatherBlockQuantized", [name for name in node.input if name]
    codes_name = inputs[0 if table else 1] if len(inputs) == 3 else ""
    scale_name = casts.get(inputs[2], inputs[2]) if len(inputs) == 3 else ""
    if codes_name not in tensors or scale_name not in tensors:
        raise ValueError("it must have codes and scales as constants, and no zero points or bias")
    codes, scale = _array(tensors[codes_name], 2 if table else 3), _array(tensors[scale_name], 2)
    fixed = {"gather_axis": 0, "quantize_axis": 1} if table else {"N": len(codes)}
    wrong = [
        f"{name} {attributes.get(name)}, not {value}" for name, value in fixed.items() if attributes.get(name) != value
    ]
    bits, block = attributes.get("bits", 0), attributes.get("block_size", 0)
    for name, value, choices in (("bits", bits, WIDTHS), ("block_size", block, BLOCKS)):
        if value not in choices:
            wrong.append(f"{name} {value}, not one of {', '.join(map(str, choices))}")
    if wrong or codes.dtype != np.uint8 or scale.dtype not in (np.float32, np.float16):
        raise ValueError(f"it has {', '.join(wrong) or f'codes {codes.dtype} and scales {scale.dtype}'}")
    flat = codes.reshape(len(codes), -1)
    length = flat.shape[1] * 8 // bits if table else attributes.get("K", 0)
    integers, expanded = decode_blocks(Blocks(flat, scale, block, length, bits))
    return QuantizedNode(integers, bits, expanded, None if table else attributes.get("accuracy_level", 0))


def _array(tensor: Any, axes: int) -> npt.NDArray[Any]:
    if len(tensor.dims) != axes:
        raise ValueError(f"the tensor {tensor.name!r:.80} has dimensions {list(tensor.dims)}: expected {axes} axes")
    try:
        return onnx_package().numpy_helper.to_array(tensor)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"the tensor {tensor.name!r:.80} is damaged: {error}") from None


def _by_layer(path: str, leaf: QuantizedTensor) -> Iterator[tuple[str, QuantizedTensor]]:
    """Yield the layers of a quantized weight with the names of their nodes."""
    if "/blocks/" not in path:
        yield path, leaf
        return
    for i in range(leaf.shape[0]):
        yield path.replace("/blocks/", f"/blocks/{i}/"), layer(leaf, i)


def _same(node: QuantizedNode, leaf: QuantizedTensor) -> bool:
    """Whether a node has the integers and scales of a weight, bit for bit; rows of a table may be padded with zeros."""
    integers, scale = (np.moveaxis(np.asarray(each), leaf.axis, -1) for each in (leaf.integers, leaf.scale))
    length = integers.shape[-1]
    expanded = scale if scale.shape[-1] == 1 else scale.repeat(leaf.group, axis=-1)[..., :length]
    expanded = np.broadcast_to(expanded, integers.shape).astype(np.float32)
    return (
        node.bits == code_bits(leaf)
        and node.integers.shape[0] == len(integers)
        and 0 <= node.integers.shape[1] - length < 8 // node.bits
        and not node.integers[:, length:].any()
        and np.array_equal(node.integers[:, :length], integers)
        and np.array_equal(node.scale[:, :length].view(np.uint32), np.ascontiguousarray(expanded).view(np.uint32))
    )
