"""Build the ONNX graphs of both towers, with the operators of ONNX Runtime for quantized weights and attention.

Values have the names of the taps in `tclip_jax.numerics.taps`, so that a comparison can ask for them.
"""

from __future__ import annotations

import dataclasses
import importlib
import operator
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from tclip_jax.interop.onnx_blocks import Blocks, encode_blocks
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import PATCH_EMBEDDING
from tclip_jax.ternary import QuantizedTensor, TernaryTensor

OPSET, IR_VERSION = 20, 9  # the oldest with a Gelu
CONTRIB = "com.microsoft"
OUTPUTS = {"image": "image_embeds", "text": "text_embeds"}

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Form:
    """How weights are stored.

    Attributes:
      packed: ternary weights as 2-bit blocks, uniform ones as 4- and 8-bit blocks; otherwise as floats.
      dtype: "float32" or "float16", of the scales and of all that stays float. The computation is float32.
      accuracy_level: of a product with packed weights. 1: weights are expanded to float32, which is exact and slow.
        4: activations are rounded to int8, in blocks, within the product.
      bits: the fewest bits of a packed weight, for which the files are named: 2 with trits, otherwise 4 or 8.
    """

    packed: bool = True
    dtype: str = "float32"
    accuracy_level: int = 4
    bits: int = 2

    @property
    def web_dtype(self) -> str:
        """The dtype by which transformers.js knows the files: q2, q2f16, q4, q4f16, q8, fp32 or fp16."""
        if not self.packed:
            return "fp32" if self.dtype == "float32" else "fp16"
        return f"q{self.bits}" + ("f16" if self.dtype == "float16" and self.bits < 8 else "")

    @property
    def suffix(self) -> str:
        """What transformers.js appends to a file's name for its dtype."""
        return {"fp32": "", "q8": "_quantized"}.get(self.web_dtype, f"_{self.web_dtype}")


def onnx_package() -> Any:
    """Return the onnx module.

    Raises:
      ValueError: it is not installed.
    """
    try:
        return importlib.import_module("onnx")
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: ONNX files need pip install 'tclip-jax[onnx]'") from None


def build_tower(tower: str, config: CLIPConfig, leaves: Mapping[str, Any], form: Form) -> Any:
    """Return the graph of a tower, an `onnx.GraphProto`.

    The image tower takes pixel_values (batch, 3, H, W) float32 and returns image_embeds (batch, embed_dim). The text
    tower takes input_ids and attention_mask (batch, T) int64, and returns text_embeds; it ignores the mask, as the
    model does. T is at most the context length, or equal to it if the padding reaches the embedding: without a causal
    mask, or pooled at the last token. The embeddings are not normalised.

    Args:
      tower: "image" or "text".
      config: the model.
      leaves: parameters by path; leaves are `QuantizedTensor` or arrays, also lazy ones.
      form: how weights are stored.

    Raises:
      ValueError: blocks cannot hold a weight, or a weight is not finite in `form.dtype`; the message names it.
    """
    return _Graph(tower, config, leaves, form).build()


class _Graph:
    """Nodes and initializers of one tower, added in the order of the computation."""

    def __init__(self, tower: str, config: CLIPConfig, leaves: Mapping[str, Any], form: Form) -> None:
        self.onnx = onnx_package()
        self.tower, self.config, self.form = tower, config, form
        self.shape: VisionConfig | TextConfig = config.vision if tower == "image" else config.text
        # Lazy leaves are loaded once, not once a layer.
        self.leaves = {
            path: leaf if isinstance(leaf, QuantizedTensor) else np.asarray(leaf)
            for path, leaf in leaves.items()
            if path.startswith(f"{tower}/")
        }
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}

    def build(self) -> Any:
        helper, types = self.onnx.helper, self.onnx.TensorProto
        if self.tower == "image":
            self.image(self.config.vision)
            inputs: dict[str, tuple[Any, list[Any]]]
            inputs = {"pixel_values": (types.FLOAT, ["batch", 3, *self.config.vision.image_size])}
        else:
            self.text(self.config.text)
            sides = ["batch", self.config.text.context_length if pads(self.config.text) else "sequence"]
            inputs = {"input_ids": (types.INT64, sides), "attention_mask": (types.INT64, sides)}
        output = helper.make_tensor_value_info(OUTPUTS[self.tower], types.FLOAT, ["batch", self.config.embed_dim])
        infos = [helper.make_tensor_value_info(name, *info) for name, info in inputs.items()]
        return helper.make_graph(self.nodes, f"tclip_{self.tower}", infos, [output], [*self.initializers.values()])

    def image(self, cfg: VisionConfig) -> None:
        x = self.patches(cfg)
        added = self.floats("image/position_embedding", self.leaf("image/position_embedding"))
        if cfg.class_token:
            # The class token is a row of zeros, to which a constant is added: the class embedding and its position
            # embedding. So the graph needs no batch size.
            x = self.node("Pad", [x, self.integers([0, 1, 0, 0, 0, 0])], "image/tokens")
            class_1D = self.floats("image/class_embedding", np.reshape(self.leaf("image/class_embedding"), (1, -1)))
            class_TD = self.node("Pad", [class_1D, self.integers([0, 0, cfg.tokens - 1, 0])], "image/class")
            added = self.node("Add", [class_TD, added], "image/class_and_positions")
        x = self.node("Add", [x, added], "image/embedded" if cfg.no_ln_pre else "image/positioned")
        if not cfg.no_ln_pre:
            x = self.norm(x, "image/ln_pre", "image/embedded")
        x = self.blocks(x, cfg, causal=False)
        if cfg.final_ln_after_pool or cfg.pool_type == "tok":
            x = self.norm(self.pooled_image(x, cfg), "image/ln_post", "image/ln_post")
        else:
            x = self.pooled_image(self.norm(x, "image/ln_post", "image/ln_post"), cfg)
        self.project(x, cfg.projection, bias=False)

    def project(self, x: str, projected: bool, bias: bool) -> None:
        """Add the projection, or name the pooled token as the output of the tower."""
        if projected:
            self.dense(x, f"{self.tower}/projection", OUTPUTS[self.tower], bias)
        else:
            self.node("Identity", [x], OUTPUTS[self.tower])

    def patches(self, cfg: VisionConfig) -> str:
        """Return the patch embedding (B, patches, width): a convolution if its weight is stored as floats."""
        kernel, patch, (rows, columns) = self.leaf(PATCH_EMBEDDING), cfg.patch_size, cfg.grid
        if isinstance(kernel, QuantizedTensor) and self.form.packed:
            sides = self.integers([rows * patch, columns * patch])
            x = self.node("Slice", ["pixel_values", self.integers([0, 0]), sides, self.integers([2, 3])], "image/whole")
            x = self.reshape(x, [0, 3, rows, patch, columns, patch], "image/cut")
            x = self.node("Transpose", [x], "image/cut_last", perm=[0, 2, 4, 3, 5, 1])
            x = self.reshape(x, [0, rows * columns, patch * patch * 3], "image/patches")
            x = self.product(
                x, PATCH_EMBEDDING, kernel, "image/patch_product" if cfg.patch_bias else "image/patch_embedding"
            )
            if not cfg.patch_bias:
                return x
            bias = self.floats("image/patch_embedding/bias", self.leaf("image/patch_embedding/bias"))
            return self.node("Add", [x, bias], "image/patch_embedding")
        weight = np.reshape(_dense(kernel), (patch, patch, 3, cfg.width)).transpose(3, 2, 0, 1)
        weight_name = self.floats(PATCH_EMBEDDING, weight)
        inputs = ["pixel_values", weight_name]
        if cfg.patch_bias:
            inputs.append(self.floats("image/patch_embedding/bias", self.leaf("image/patch_embedding/bias")))
        x = self.node("Conv", inputs, "image/conv", strides=[patch, patch])
        x = self.reshape(x, [0, cfg.width, rows * columns], "image/conv_flat")
        return self.node("Transpose", [x], "image/patch_embedding", perm=[0, 2, 1])

    def pooled_image(self, x: str, cfg: VisionConfig) -> str:
        if cfg.pool_type == "tok":
            return self.node("Gather", [x, self.integers(0)], "image/pooled", axis=1)
        if cfg.pool_type == "map":
            return self.attention_pool(x, cfg)
        if not cfg.class_token:
            return self.node("ReduceMean", [x, self.integers([1])], "image/pooled", keepdims=0)
        ends = [self.integers([1]), self.integers([np.iinfo(np.int64).max]), self.integers([1])]
        patches = self.node("Slice", [x, *ends], "image/patch_tokens")
        return self.node("ReduceMean", [patches, self.integers([1])], "image/pooled", keepdims=0)

    def attention_pool(self, x: str, cfg: VisionConfig) -> str:
        """Add the attention of one learned query, the same for every image, and the MLP after it."""
        place = "image/pool"
        probe = self.floats(f"{place}/attention/probe", np.reshape(self.leaf(f"{place}/attention/probe"), (1, 1, -1)))
        query = self.dense(probe, f"{place}/attention/q")
        # As many copies as there are images: the first token of each, times 0.
        start = [self.integers([0]), self.integers([1]), self.integers([1])]
        none = self.node("Mul", [self.node("Slice", [x, *start], f"{place}/first"), self.zero()], f"{place}/zeros")
        query = self.node("Add", [none, query], f"{place}/queries")
        keys_values = self.dense(x, f"{place}/attention/kv")
        parts = [f"{place}/attention/{part}" for part in ("k", "v")]
        split = self.onnx.helper.make_node("Split", [keys_values], parts, f"{place}/split", axis=-1, num_outputs=2)
        self.nodes.append(split)
        heads: dict[str, Any] = {"num_heads": cfg.heads, "unidirectional": 0}
        y = self.node("MultiHeadAttention", [query, *parts], f"{place}/attention/mixed", CONTRIB, **heads)
        x = self.dense(y, f"{place}/attention/out")
        y = self.activation(self.dense(self.norm(x, f"{place}/ln"), f"{place}/mlp/fc1"), f"{place}/mlp/active")
        x = self.node("Add", [x, self.dense(y, f"{place}/mlp/fc2")], f"{place}/added")
        return self.node("Squeeze", [x, self.integers([1])], "image/pooled")

    def zero(self) -> str:
        return self.initializer("zero", np.zeros((), np.float32))

    def text(self, cfg: TextConfig) -> None:
        x = self.tokens(cfg)
        position = self.floats("text/position_embedding", self.leaf("text/position_embedding"))
        if not pads(cfg):
            length = self.node("Shape", ["input_ids"], "text/length", start=1, end=2)
            position = self.node("Slice", [position, self.integers([0]), length, self.integers([0])], "text/positions")
        x = self.node("Add", [x, position], "text/embedded")
        x = self.blocks(x, cfg, causal=not cfg.no_causal_mask)
        if cfg.pool_type == "argmax":
            ids = self.node("Cast", ["input_ids"], "text/ids", to=self.onnx.TensorProto.INT32)
            end = self.node("ArgMax", [ids], "text/end", axis=1, keepdims=1)
            x = self.node("GatherND", [x, end], "text/pooled", batch_dims=1)
        elif cfg.pool_type == "eos":
            ends = self.node("Equal", ["input_ids", self.integers(cfg.eos_id)], "text/ends")
            ends = self.node("Cast", [ends], "text/ends_as_numbers", to=self.onnx.TensorProto.INT32)
            end = self.node("ArgMax", [ends], "text/end", axis=1, keepdims=1)
            x = self.node("GatherND", [x, end], "text/pooled", batch_dims=1)
        else:
            pooled = cfg.context_length - 1 if cfg.pool_type == "last" else 0
            x = self.node("Gather", [x, self.integers(pooled)], "text/pooled", axis=1)
        x = self.norm(x, "text/ln_final", "text/ln_final")
        self.project(x, cfg.proj_type == "linear", cfg.proj_bias)

    def tokens(self, cfg: TextConfig) -> str:
        path, name = "text/token_embedding/embedding", "text/token_embedding"
        table = self.leaf(path)
        if not (isinstance(table, QuantizedTensor) and self.form.packed):
            return self.node("Gather", [self.floats(path, _dense(table)), "input_ids"], name)
        # The result has the dtype of the scales: in float16, an integer of 8 bits times a scale would be rounded.
        blocks = encode_blocks(path, table, self.form.dtype if isinstance(table, TernaryTensor) else "float32")
        row = -(-cfg.width * blocks.bits // 8)  # bytes; rows end with the weights, not with the block
        # OpenVINO does not accept scales that are cast.
        inputs = [
            self.initializer(_codes_name(path, blocks), blocks.codes[:, :row]),
            "input_ids",
            self.initializer(f"{path}.scale", blocks.scale),
        ]
        layout: dict[str, Any] = {"bits": blocks.bits, "block_size": blocks.block, "gather_axis": 0, "quantize_axis": 1}
        x = self.node("GatherBlockQuantized", inputs, f"{name}/bytes", CONTRIB, called=path, **layout)
        ends = [self.integers([0]), self.integers([cfg.width]), self.integers([2])]
        x = self.node("Slice", [x, *ends], f"{name}/rows")
        return self.node("Cast", [x], name, to=self.onnx.TensorProto.FLOAT)

    def blocks(self, x: str, cfg: VisionConfig | TextConfig, causal: bool) -> str:
        for i in range(cfg.layers):
            place = f"{self.tower}/blocks/{i}"
            y = self.dense(self.norm(x, f"{place}/ln_1"), f"{place}/attention/qkv")
            parts = [f"{place}/attention/{part}" for part in "qkv"]
            self.nodes.append(
                self.onnx.helper.make_node("Split", [y], parts, f"{place}/attention/split", axis=-1, num_outputs=3)
            )
            heads: dict[str, Any] = {"num_heads": cfg.heads, "unidirectional": int(causal)}
            y = self.node("MultiHeadAttention", parts, f"{place}/attention/mixed", CONTRIB, **heads)
            y = self.dense(y, f"{place}/attention/out", f"{place}/attention")
            x = self.residual(x, y, place, "ls_1", f"{place}/attended")
            y = self.dense(self.norm(x, f"{place}/ln_2"), f"{place}/mlp/fc1")
            y = self.dense(self.activation(y, f"{place}/mlp/active"), f"{place}/mlp/fc2", f"{place}/mlp")
            x = self.residual(x, y, place, "ls_2", place)
        return x

    def activation(self, x: str, name: str) -> str:
        activation = self.config.activation(self.shape)
        if activation == "quick_gelu":
            return self.node("QuickGelu", [x], name, CONTRIB, alpha=1.702)
        return self.node("Gelu", [x], name, approximate="tanh" if activation == "gelu_tanh" else "none")

    def residual(self, x: str, y: str, place: str, gain: str, name: str) -> str:
        if f"{self.tower}/blocks/{gain}" in self.leaves:
            gain_D = self.floats(f"{place}/{gain}", self.leaf(f"{place}/{gain}"))
            y = self.node("Mul", [y, gain_D], f"{place}/{gain}_scaled")
        return self.node("Add", [x, y], name)

    def norm(self, x: str, path: str, name: str = "") -> str:
        weights = [self.floats(f"{path}/{part}", self.leaf(f"{path}/{part}")) for part in ("scale", "bias")]
        return self.node(
            "LayerNormalization", [x, *weights], name or f"{path}/out", axis=-1, epsilon=self.shape.norm_eps
        )

    def dense(self, x: str, path: str, name: str = "", bias: bool = True) -> str:
        """Add a dense layer; `name` is that of its result."""
        name = name or f"{path}/out"
        y = self.product(x, f"{path}/kernel", self.leaf(f"{path}/kernel"), f"{path}/product" if bias else name)
        if not bias:
            return y
        return self.node("Add", [y, self.floats(f"{path}/bias", self.leaf(f"{path}/bias"))], name)

    def product(self, x: str, path: str, weight: Any, name: str) -> str:
        if not (isinstance(weight, QuantizedTensor) and self.form.packed):
            return self.node("MatMul", [x, self.floats(path, _dense(weight))], name)
        blocks = encode_blocks(_stacked(path), weight, self.form.dtype)
        codes = self.initializer(_codes_name(path, blocks), _shaped(blocks))
        inputs = [x, codes, self.floats(f"{path}.scale", blocks.scale)]
        layout: dict[str, Any] = {"K": blocks.length, "N": len(blocks.codes), "bits": blocks.bits}
        layout |= {"block_size": blocks.block, "accuracy_level": self.form.accuracy_level}
        return self.node("MatMulNBits", inputs, name, CONTRIB, called=path, **layout)

    def leaf(self, path: str) -> Any:
        """Return a parameter, or its layer i for a path with blocks/i."""
        stacked = _stacked(path)
        leaf = self.leaves[stacked]
        return leaf if stacked == path else layer(leaf, int(path.split("/")[2]))

    def floats(self, name: str, value: Any) -> str:
        """Return the name of a float32 constant that is stored in `form.dtype`."""
        with np.errstate(over="ignore"):
            stored = np.asarray(value).astype(self.form.dtype)
        if not np.isfinite(stored).all():
            raise ValueError(f"{name} is not finite in {self.form.dtype}: NaN, infinity, or too large")
        if self.form.dtype == "float32":
            return self.initializer(name, stored)
        half = self.initializer(f"{name}.half", stored)
        return self.node("Cast", [half], name, to=self.onnx.TensorProto.FLOAT)

    def integers(self, value: int | list[int]) -> str:
        array = np.array(value, np.int64)
        return self.initializer(f"integers_{'_'.join(map(str, array.reshape(-1)))}_{array.ndim}", array)

    def initializer(self, name: str, value: Array) -> str:
        if name not in self.initializers:
            self.initializers[name] = self.onnx.numpy_helper.from_array(value, name)
        return name

    def reshape(self, x: str, shape: list[int], name: str) -> str:
        return self.node("Reshape", [x, self.integers(shape)], name)

    def node(
        self, op: str, inputs: list[str], output: str, domain: str = "", called: str = "", **attributes: Any
    ) -> str:
        """Add a node with one output, and return the name of that."""
        make = self.onnx.helper.make_node
        self.nodes.append(make(op, inputs, [output], called or output, domain=domain, **attributes))
        return output


def pads(config: TextConfig) -> bool:
    """Whether a text's embedding depends on the padding that follows it, so that it must fill the context."""
    return config.no_causal_mask or config.pool_type == "last"


def layer(leaf: Any, i: int) -> Any:
    """Return layer i of a stacked parameter."""
    if isinstance(leaf, QuantizedTensor):
        return jax.tree.map(operator.itemgetter(i), leaf)
    return leaf[i]


def _stacked(path: str) -> str:
    """Return the path without the index of its block."""
    parts = path.split("/")
    return "/".join(parts[:2] + parts[3:]) if parts[1] == "blocks" else path


def _codes_name(path: str, blocks: Blocks) -> str:
    return f"{path}.{'trits' if blocks.bits == 2 else 'integers'}"


def _shaped(blocks: Blocks) -> Array:
    """Return codes (N, blocks, bytes of a block)."""
    return blocks.codes.reshape(*blocks.scale.shape, blocks.block * blocks.bits // 8)


def _dense(weight: Any) -> Array:
    """Return a weight as floats, dequantized if it is quantized."""
    return np.asarray(weight.dequantize() if isinstance(weight, QuantizedTensor) else weight)
