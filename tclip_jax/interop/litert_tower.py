"""The towers as functions that litert-converter turns into LiteRT's own operators.

A product x · Wᵀ of two axes becomes FULLY_CONNECTED, and a composite EMBEDDING_LOOKUP: these two take packed weights.
The matrices are arguments, so the converter does not need their values. Blocks are unrolled, because it fails on scans.
Activations have two axes between the products, and a batch of a fixed size.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from packaging.version import Version

from tclip_jax.models.attention import attend
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.layers import activate
from tclip_jax.models.ternary_rules import PATCH_EMBEDDING, TOKEN_EMBEDDING
from tclip_jax.models.text import pooled_position
from tclip_jax.models.vision import patchify

INPUTS = {"image": "pixel_values", "text": "input_ids"}
OUTPUTS = {"image": "image_embeds", "text": "text_embeds"}
SIGNATURE = "serving_default"  # the only signature of a file
OLDEST_CONVERTER = "0.5.0"

Values = Mapping[str, Any]


class Skeleton(NamedTuple):
    """A converted tower whose matrices are inputs.

    Attributes:
      file: the content of a .tflite file.
      matrices: names of the inputs that are matrices.
      taps: names of the outputs that are activations, see `tclip_jax.numerics.taps`; tokens are on the first axis.
    """

    file: bytes
    matrices: tuple[str, ...]
    taps: tuple[str, ...]


def converter_version() -> str:
    """Return the version of litert-converter.

    Raises:
      ValueError: it is not installed or too old.
    """
    try:
        version = importlib.metadata.version("litert-converter")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("LiteRT files are written by litert-converter: pip install 'tclip-jax[litert]'") from None
    if Version(version) < Version(OLDEST_CONVERTER):
        raise ValueError(f"litert-converter {version} is too old: install {OLDEST_CONVERTER} or newer")
    return version


def convert_tower(
    tower: str, config: CLIPConfig, vectors: Values, shapes: Mapping[str, tuple[int, ...]], batch: int
) -> Skeleton:
    """Convert a tower whose matrices have shapes but no values yet.

    Args:
      tower: "image" or "text".
      config: the model.
      vectors: float32 parameters by path, without the matrices; those of blocks have the index of their layer, as in
        "image/blocks/0/ln_1/scale".
      shapes: shapes of the matrices by path: (outputs, inputs), of a table (entries, width). Inputs beyond those of the
        model are multiplied by zero.
      batch: number of images or texts.

    Raises:
      ValueError: litert-converter is not installed or too old, or fails.
    """
    size = (*config.vision.image_size, 3) if tower == "image" else (config.text.context_length,)
    inputs = jax.ShapeDtypeStruct((batch, *size), jnp.float32 if tower == "image" else jnp.int32)
    matrices = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in sorted(shapes.items())}
    run = _image if tower == "image" else _text
    traced = jax.jit(functools.partial(run, config, vectors), keep_unused=True).trace(matrices, inputs)
    lowered = traced.lower(lowering_platforms=("cpu",))
    outputs: dict[str, Any] = lowered.out_info
    file = _convert(tower, lowered.as_text(), [*matrices, INPUTS[tower]], sorted(outputs))
    return Skeleton(file, tuple(matrices), tuple(sorted(outputs.keys() - {OUTPUTS[tower]})))


def _convert(tower: str, program: str, inputs: list[str], outputs: list[str]) -> bytes:
    """Convert StableHLO text; the names are those of the arguments and results of its main function."""
    version = converter_version()
    api: Any = importlib.import_module("litert_converter.converter_api_ext")
    ir: Any = importlib.import_module("litert_converter.mlir.ir")
    passes: Any = importlib.import_module("litert_converter.mlir.passmanager")
    try:
        with ir.Context() as context:
            api.prepare_mlir_context(context)
            module = ir.Module.parse(program)
            api.set_signature(module.operation, SIGNATURE, inputs, outputs)
            settings = api.ConvertToTFLConfig()
            settings.model_origin_framework = "JAX"
            api.run_convert_to_tfl_passes(module, passes.PassManager(), settings)
            return bytes(api.export_flatbuffer_to_bytes(module.operation))
    # The errors of MLIR have no common base but Exception.
    except Exception as error:
        words = " ".join(str(error).split())[:200]
        raise ValueError(f"litert-converter {version} cannot convert the {tower} tower: {words}") from None


def _image(config: CLIPConfig, vectors: Values, matrices: Values, pixels_BHWC: jax.Array) -> dict[str, jax.Array]:
    """Return the embeddings and taps of the image tower."""
    cfg, batch = config.vision, pixels_BHWC.shape[0]
    x_BNK = patchify(pixels_BHWC, cfg.patch_size)
    x_MD = _product(x_BNK.reshape(-1, x_BNK.shape[-1]), matrices[PATCH_EMBEDDING])
    taps = {"image/patch_embedding": x_MD + vectors["image/patch_embedding/bias"] if cfg.patch_bias else x_MD}
    x_BTD = taps["image/patch_embedding"].reshape(batch, -1, cfg.width)
    if cfg.class_token:
        class_B1D = jnp.broadcast_to(vectors["image/class_embedding"], (batch, 1, cfg.width))
        x_BTD = jnp.concatenate([class_B1D, x_BTD], axis=1)
    x_MD = (x_BTD + vectors["image/position_embedding"]).reshape(-1, cfg.width)
    x_MD = x_MD if cfg.no_ln_pre else _norm(x_MD, "image/ln_pre", vectors, cfg.norm_eps)
    x_MD = _blocks(x_MD, "image", config, vectors, matrices, batch, taps)

    def pool(x_MD: jax.Array) -> jax.Array:
        if cfg.pool_type == "map":
            return _attention_pool(x_MD, config, vectors, matrices, batch)
        x_BTD = x_MD.reshape(batch, -1, cfg.width)
        return x_BTD[:, 0] if cfg.pool_type == "tok" else x_BTD[:, int(cfg.class_token) :].mean(axis=1)

    if cfg.final_ln_after_pool or cfg.pool_type == "tok":
        x_BD = taps["image/ln_post"] = _norm(pool(x_MD), "image/ln_post", vectors, cfg.norm_eps)
    else:
        taps["image/ln_post"] = _norm(x_MD, "image/ln_post", vectors, cfg.norm_eps)
        x_BD = pool(taps["image/ln_post"])
    if cfg.projection:
        return taps | {OUTPUTS["image"]: _product(x_BD, matrices["image/projection/kernel"])}
    return {name: tap for name, tap in taps.items() if tap is not x_BD} | {OUTPUTS["image"]: x_BD}


def _attention_pool(x_MD: jax.Array, config: CLIPConfig, vectors: Values, matrices: Values, batch: int) -> jax.Array:
    """Pool M = batch · T tokens as `AttentionPool`: (B, D)."""
    cfg = config.vision

    def dense(x: jax.Array, name: str) -> jax.Array:
        return _product(x, matrices[f"image/pool/{name}/kernel"]) + vectors[f"image/pool/{name}/bias"]

    def heads(x: jax.Array, rows: int) -> jax.Array:
        return x.reshape(rows, -1, cfg.heads, cfg.width // cfg.heads)

    # A row for each image before the product: LiteRT does not know the shape of its result, and cannot broadcast it.
    probe_BD = jnp.broadcast_to(vectors["image/pool/attention/probe"], (batch, cfg.width))
    query = heads(dense(probe_BD, "attention/q"), batch)
    keys, values = (heads(part, batch) for part in jnp.split(dense(x_MD, "attention/kv"), 2, -1))
    mixed = attend(query, keys, values, causal=False)
    x_BD = dense(mixed.reshape(batch, cfg.width), "attention/out")
    normal_BD = _norm(x_BD, "image/pool/ln", vectors, cfg.norm_eps)
    return x_BD + dense(_activation(dense(normal_BD, "mlp/fc1"), config, cfg), "mlp/fc2")


def _text(config: CLIPConfig, vectors: Values, matrices: Values, tokens_BT: jax.Array) -> dict[str, jax.Array]:
    """Return the embeddings and taps of the text tower."""
    cfg, (batch, length) = config.text, tokens_BT.shape
    taps = {"text/token_embedding": _look_up(tokens_BT.reshape(-1), matrices[TOKEN_EMBEDDING])[:, : cfg.width]}
    x_BTD = taps["text/token_embedding"].reshape(batch, length, -1) + vectors["text/position_embedding"]
    x_MD = _blocks(x_BTD.reshape(-1, cfg.width), "text", config, vectors, matrices, batch, taps)
    is_end_BT1 = jnp.expand_dims(jnp.arange(length) == pooled_position(tokens_BT, cfg)[:, None], -1)
    x_BD = jnp.where(is_end_BT1, x_MD.reshape(batch, length, -1), 0).sum(axis=1)
    x_BD = _norm(x_BD, "text/ln_final", vectors, cfg.norm_eps)
    if cfg.proj_type == "none":
        return taps | {OUTPUTS["text"]: x_BD}
    x_BE = _product(x_BD, matrices["text/projection/kernel"])
    x_BE = x_BE + vectors["text/projection/bias"] if cfg.proj_bias else x_BE
    return taps | {"text/ln_final": x_BD, OUTPUTS["text"]: x_BE}


def _blocks(
    x_MD: jax.Array,
    tower: str,
    config: CLIPConfig,
    vectors: Values,
    matrices: Values,
    batch: int,
    taps: dict[str, jax.Array],
) -> jax.Array:
    """Apply all blocks to M = batch · T tokens, and add their taps."""
    cfg: VisionConfig | TextConfig = config.vision if tower == "image" else config.text
    causal = isinstance(cfg, TextConfig) and not cfg.no_causal_mask
    taps[f"{tower}/embedded"] = x_MD
    for i in range(cfg.layers):
        place = f"{tower}/blocks/{i}"

        def dense(x: jax.Array, name: str, place: str = place) -> jax.Array:
            return _product(x, matrices[f"{place}/{name}/kernel"]) + vectors[f"{place}/{name}/bias"]

        qkv_M3D = dense(_norm(x_MD, f"{place}/ln_1", vectors, cfg.norm_eps), "attention/qkv")
        q_BTHK, k_BTHK, v_BTHK = (
            part.reshape(batch, -1, cfg.heads, cfg.width // cfg.heads) for part in jnp.split(qkv_M3D, 3, -1)
        )
        mixed_MD = attend(q_BTHK, k_BTHK, v_BTHK, causal).reshape(-1, cfg.width)
        taps[f"{place}/attention"] = dense(mixed_MD, "attention/out")
        x_MD = x_MD + taps[f"{place}/attention"] * vectors.get(f"{place}/ls_1", 1)
        hidden_MF = dense(_norm(x_MD, f"{place}/ln_2", vectors, cfg.norm_eps), "mlp/fc1")
        hidden_MF = _activation(hidden_MF, config, cfg)
        taps[f"{place}/mlp"] = dense(hidden_MF, "mlp/fc2")
        x_MD = x_MD + taps[f"{place}/mlp"] * vectors.get(f"{place}/ls_2", 1)
        taps[place] = x_MD
    return x_MD


def _product(x_MK: jax.Array, w_NK: jax.Array) -> jax.Array:
    """Multiply x · Wᵀ, with zeros for inputs that W has beyond those of x."""
    x_MK = jnp.pad(x_MK, ((0, 0), (0, w_NK.shape[1] - x_MK.shape[1])))
    return jax.lax.dot_general(x_MK, w_NK, (((1,), (1,)), ((), ())))


def _norm(x: jax.Array, path: str, vectors: Values, epsilon: float) -> jax.Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    normalized = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + epsilon)
    return normalized * vectors[f"{path}/scale"] + vectors[f"{path}/bias"]


# The converter knows these composites by name, and replaces each with one operator.


def _look_up(ids_M: jax.Array, table_VD: jax.Array) -> jax.Array:
    take = functools.partial(jnp.take, axis=0, mode="clip")
    return jax.lax.composite(lambda ids, table: take(table, ids), "odml.embedding_lookup")(ids_M, table_VD)


def _activation(x: jax.Array, config: CLIPConfig, tower: VisionConfig | TextConfig) -> jax.Array:
    activation = config.activation(tower)
    if activation == "quick_gelu":
        return activate(x, activation)
    gelu = jax.lax.composite(lambda x, approximate: activate(x, activation), "aten.gelu.default")
    return gelu(x, approximate=tower.approximate)
