"""Write a CLIP as one LiteRT file a tower, with quantized weights as INT4 and INT8, and verify what was written.

    litert/image.tflite   pixel_values float32 (N, H, W, 3), normalised -> image_embeds float32 (N, embed_dim)
    litert/text.tflite    input_ids int32 (N, context length)           -> text_embeds float32 (N, embed_dim)

N is fixed when the files are written. Each file has one signature with these names, and describes itself: its metadata
have the configuration, the preprocessing and the logit scale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.artifacts.manifest import refuse_constant
from tclip_jax.artifacts.pack import flatten
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.examples import Examples
from tclip_jax.interop.litert_flatbuffer import Flatbuffer, Matrix, fill_skeleton
from tclip_jax.interop.litert_integers import Integers, decode_integers, encode_integers, is_rounded
from tclip_jax.interop.litert_session import run_litert, runtime_version
from tclip_jax.interop.litert_tower import convert_tower, converter_version
from tclip_jax.interop.metadata import Metadata, parse_open_clip
from tclip_jax.interop.onnx import check_leaves
from tclip_jax.interop.onnx_graph import layer
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TERNARIZABLE, TOKEN_EMBEDDING, matrix_shape
from tclip_jax.schema import check_names
from tclip_jax.storage import write_atomic
from tclip_jax.ternary import QuantizedTensor

FILES = {"image": "image.tflite", "text": "text.tflite"}
MIN_COSINE = 0.9995  # of embeddings: LiteRT's products with packed weights round activations to int8
_CONFIG, _LOGIT_SCALE = "open_clip_config", "logit_scale"


def write_litert(
    folder: epath.PathLike, *, config: CLIPConfig, preprocess: Preprocess, params: Mapping[str, Any], batch: int = 1
) -> None:
    """Write both towers of a model into a folder, each file atomically. Equal arguments give equal bytes.

    Args:
      folder: an existing folder, local or remote (gs://).
      config: the model.
      preprocess: the preprocessing of its images, for the metadata.
      params: parameter tree with `QuantizedTensor` leaves; other leaves may be lazy.
      batch: N, the number of images or texts that the files take.

    Raises:
      ValueError: the parameters do not match `config`; no parameter is quantized; INT4 or INT8 cannot hold groups or
        scales; a weight is not finite; a tower exceeds 2 GiB; or litert-converter is missing, too old, or fails.
    """
    converter_version()
    leaves = flatten(params)
    check_leaves(leaves, config)
    if not any(isinstance(leaf, QuantizedTensor) for leaf in leaves.values()):
        raise ValueError("no parameter is quantized: litert packs trits and integers")
    described = {
        _CONFIG: {"model_cfg": config.to_open_clip(), "preprocess_cfg": preprocess.to_open_clip()},
        _LOGIT_SCALE: float(np.exp(np.asarray(leaves["logit_scale"]))),
    }
    towers = {tower: _arrays(tower, leaves) for tower in FILES}  # what INT4 cannot hold is refused before a file exists
    for tower, arrays in towers.items():
        matrices = {name: value for name, value in arrays.items() if _is_matrix(name)}
        vectors = {name: value for name, value in arrays.items() if name not in matrices}
        shapes = {name: value.shape for name, value in matrices.items()}
        skeleton = convert_tower(tower, config, vectors, shapes, batch)
        try:
            file = fill_skeleton(skeleton, matrices, json.dumps(described).encode())
        except ValueError as error:
            raise ValueError(f"the {tower} tower: {error}") from None
        write_atomic(epath.Path(folder) / FILES[tower], file)


def verify_litert(folder: epath.PathLike, params: Mapping[str, Any]) -> None:
    """Read the files of a folder again, and compare every matrix with what was written: integers and scales, or floats.

    Raises:
      ValueError: a file is damaged, or something differs; the message names the file and the first weight.
    """
    leaves = flatten(params)
    for tower, name in FILES.items():
        file = Flatbuffer(epath.Path(folder) / name)
        expected = {path: leaf for path, leaf in _by_layer(tower, leaves).items() if _is_matrix(path)}
        quantized = [path for path, leaf in expected.items() if isinstance(leaf, QuantizedTensor)]
        try:
            check_names(file.integer_names(), quantized, "the list of packed weights")
            for path, leaf in expected.items():
                if not _same(file.matrix(path), path, leaf):
                    raise ValueError(f"{path} differs from the given parameters")
        except ValueError as error:
            raise ValueError(f"{file.path}: {error}") from None


def verify_embeddings(folder: epath.PathLike, examples: Examples) -> str:
    """Run both towers in LiteRT and compare their embeddings, normalised, with those of JAX.

    Args:
      folder: the folder with the files.
      examples: inputs and embeddings.

    Returns:
      The result in one line; it says so if LiteRT is not installed, and nothing was run.

    Raises:
      ValueError: the embeddings differ too much, or ai-edge-litert is too old.
    """
    version, names, cosine = runtime_version(), " and ".join(FILES.values()), 1.0
    if version is None:
        return f"{names}: not run, because ai-edge-litert is not installed; trits and scales were read back"
    for tower, inputs, expected in (
        ("image", examples.pixels, examples.image),
        ("text", examples.tokens, examples.text),
    ):
        (found,) = run_litert((epath.Path(folder) / FILES[tower]).read_bytes(), inputs)
        found = found[:, 0] / np.maximum(np.linalg.norm(found[:, 0], axis=-1, keepdims=True), 1e-12)
        cosine = min(cosine, float((found * expected).sum(axis=-1).min()))
    line = f"{names}: embeddings have a cosine of {cosine:.5f} or more with JAX's (ai-edge-litert {version})"
    if not cosine >= MIN_COSINE:
        raise ValueError(f"{line}: it must be {MIN_COSINE} or more")
    return line


def rounding_note(folder: epath.PathLike) -> list[str]:
    """Return a line if LiteRT rounds scales of the files that it multiplies with; otherwise nothing."""
    rounded = []
    for name in FILES.values():
        file = Flatbuffer(epath.Path(folder) / name)
        for path in file.integer_names():
            matrix = file.matrix(path)
            if path != TOKEN_EMBEDDING and isinstance(matrix, Integers) and is_rounded(matrix):
                rounded.append(path)
    if not rounded:
        return []
    return [
        f"{len(rounded)} weights, such as {rounded[0]}, have scales of more than 8 significant bits: the files hold"
        " them exactly, and LiteRT rounds them to bfloat16 when it runs"
    ]


def read_metadata(path: epath.PathLike) -> tuple[Metadata, float]:
    """Return configuration and preprocessing of the model of which a file holds a tower, and its logit scale.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is damaged, or was not written by `write_litert`.
    """
    stored = Flatbuffer(path).metadata()
    try:
        document = json.loads(stored, parse_constant=refuse_constant)
        described = document[_CONFIG]
        metadata = parse_open_clip(_CONFIG, described["model_cfg"], described["preprocess_cfg"])
        return metadata, float(document[_LOGIT_SCALE])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not state a model of tclip_jax: {error!r:.200}") from None


def _by_layer(tower: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a tower; those of blocks are cut into layers, with the index after "blocks"."""
    found: dict[str, Any] = {}
    for path, leaf in leaves.items():
        if not path.startswith(f"{tower}/"):
            continue
        value = leaf if isinstance(leaf, QuantizedTensor) else np.asarray(leaf)  # lazy leaves are loaded once
        if "/blocks/" not in path:
            found[path] = value
        else:
            found |= {path.replace("/blocks/", f"/blocks/{i}/"): layer(value, i) for i in range(value.shape[0])}
    return found


def _is_matrix(name: str) -> bool:
    parts = name.split("/")
    return "/".join(part for part in parts if not part.isdigit()) in TERNARIZABLE


def _arrays(tower: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a tower as the file has them, by layer."""
    arrays = _by_layer(tower, leaves)
    for path, leaf in arrays.items():
        if isinstance(leaf, QuantizedTensor):
            arrays[path] = encode_integers(path, leaf)
            continue
        arrays[path] = _floats(path, leaf)
        if not np.isfinite(arrays[path]).all():
            raise ValueError(f"{path} is not finite in float32: NaN, infinity, or too large")
    return arrays


def _floats(path: str, leaf: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return a float parameter in float32; a matrix with one row for each output."""
    with np.errstate(over="ignore"):
        value = leaf.astype(np.float32)
    if path == TOKEN_EMBEDDING or not _is_matrix(path):
        return value
    return np.ascontiguousarray(value.reshape(matrix_shape(value.shape)).T)


def _same(found: Matrix, path: str, leaf: Any) -> bool:
    """Whether a matrix of a file has the bits of a parameter; rows may be padded with zeros."""
    if not isinstance(found, Integers):
        return not isinstance(leaf, QuantizedTensor) and found.tobytes() == _floats(path, leaf).tobytes()
    if not isinstance(leaf, QuantizedTensor):
        return False
    found_integers, found_scale = decode_integers(found)
    integers, scale = (np.moveaxis(np.asarray(each), leaf.axis, -1) for each in (leaf.integers, leaf.scale))
    length = integers.shape[-1]
    expanded = scale if scale.shape[-1] == 1 else scale.repeat(leaf.group, axis=-1)[..., :length]
    expanded = np.broadcast_to(expanded, integers.shape).astype(np.float32)
    if len(found_integers) != len(integers) or found_integers.shape[1] < length:
        return False
    same_scale = found_scale[:, :length].view(np.uint32) == np.ascontiguousarray(expanded).view(np.uint32)
    return (
        not found_integers[:, length:].any()
        and np.array_equal(found_integers[:, :length], integers)
        and bool((same_scale | (expanded == 0)).all())  # LiteRT refuses a scale of zero
    )
