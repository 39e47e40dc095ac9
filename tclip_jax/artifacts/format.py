"""Write and read an artifact, the folder of a packed model. docs/artifact.md specifies it byte by byte."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import IO, Any, Literal, NamedTuple

import jax
import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.artifacts.coding import Stored, array_names, decode, encode
from tclip_jax.artifacts.files import (
    MAX_OTHER_BYTES,
    REST_FILE,
    TERNARY_FILE,
    WEIGHT_FILES,
    check_files,
    check_size,
    file_entry,
    open_safetensors,
    weight_file,
)
from tclip_jax.artifacts.manifest import (
    FLOAT_CODING,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    ArtifactError,
    check_image_size,
    check_tensors,
    describe,
    dump_manifest,
    lowest_version,
    parse_manifest,
)
from tclip_jax.artifacts.pack import flatten
from tclip_jax.artifacts.safetensors import LazyArray, write_safetensors
from tclip_jax.data.file_tokenizer import FileTokenizer
from tclip_jax.data.images import Preprocess
from tclip_jax.data.tokenizer import Tokenizer, is_vocabulary, vocabulary_files
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TERNARIZABLE, TernaryRules, find_quantizer
from tclip_jax.parallel.sharding import path_of
from tclip_jax.schema import check_names
from tclip_jax.storage import atomic_folder
from tclip_jax.ternary import QuantizedTensor


class Artifact(NamedTuple):
    """A packed model in memory.

    Attributes:
      config: the model's shape.
      preprocess: the preprocessing of its images.
      params: parameter tree with `TernaryTensor`, `UniformTensor` and float32 leaves.
      rules: the quantization rules that made the quantized leaves.
      manifest: the parsed tclip.json.
      tokenizer: what tokenizes texts, if it is not CLIP's own; None if the artifact has none.
    """

    config: CLIPConfig
    preprocess: Preprocess
    params: dict[str, Any]
    rules: TernaryRules
    manifest: dict[str, Any]
    tokenizer: FileTokenizer | None = None


def write_artifact(
    folder: epath.PathLike,
    *,
    config: CLIPConfig,
    preprocess: Preprocess,
    params: Mapping[str, Any],
    rules: TernaryRules,
    tokenizer: FileTokenizer | None = None,
    rest_dtype: Literal["float16", "float32"] = "float16",
    figures: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a packed model as an artifact, atomically. Equal arguments give equal bytes.

    Args:
      folder: the artifact's path, local or gs://.
      config: the model's shape.
      preprocess: the preprocessing of its images.
      params: parameter tree with `QuantizedTensor` leaves, from `pack_params`; other leaves may be lazy.
      rules: the quantization rules that made the quantized leaves. They are recorded, not applied.
      tokenizer: what tokenizes texts, of a model whose tokenizer is not CLIP's own.
      rest_dtype: dtype of all other parameters; logit_scale is always float32.
      figures: measurements to store with the model, as JSON.
      provenance: the origin of the model, as JSON; the versions of the libraries are added.
      overwrite: replace `folder` if it is an artifact. Any other folder is never replaced.

    Raises:
      ArtifactError: the parameters do not match `config`, are not packed, or cannot be stored.
      FileExistsError: `folder` exists.
    """
    folder = epath.Path(folder)
    if overwrite and folder.exists() and not (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder} has no {MANIFEST}, so it is not an artifact: only artifacts are overwritten")
    check_image_size(config, preprocess)
    leaves = flatten(params)
    tensors: dict[str, Any] = {}
    quantized: dict[str, Stored] = {TERNARY_FILE: {}, REST_FILE: {}}
    for path, leaf in leaves.items():
        dtype = "float32" if path == "logit_scale" else rest_dtype
        if isinstance(leaf, QuantizedTensor):
            tensors[path], arrays = encode(path, leaf, dtype)
            quantized[weight_file(tensors[path])] |= arrays
        elif path in TERNARIZABLE and find_quantizer(path, rules):
            raise ArtifactError(f"{path} holds latent weights, but a rule quantizes it: call pack_params first")
        else:
            tensors[path] = {"coding": FLOAT_CODING, "shape": list(np.shape(leaf)), "dtype": dtype}
    check_tensors(tensors, flatten(param_shapes(config)))

    def encoded(path: str) -> npt.NDArray[Any]:
        tensors[path], arrays = encode(path, leaves[path], tensors[path]["dtype"])
        return arrays[path]

    with atomic_folder(folder, overwrite=overwrite) as building, tempfile.TemporaryFile() as spool:
        # The header of the file needs all sizes first. Spooling keeps one leaf of a lazy tree in memory at a time.
        rest = {
            path: _spooled(spool, encoded(path)) for path, entry in tensors.items() if entry["coding"] == FLOAT_CODING
        }
        weights = {
            TERNARY_FILE: write_safetensors(building / TERNARY_FILE, quantized[TERNARY_FILE]),
            REST_FILE: write_safetensors(building / REST_FILE, {**rest, **quantized[REST_FILE]}),
        }
        if not config.text.hf_tokenizer_name:
            Tokenizer(config.text.context_length).save(building)
        elif tokenizer:
            (building / tokenizer.file).write_bytes(tokenizer.data)
        _write_preprocessor_config(building, preprocess)
        fields = {
            "format_version": lowest_version(tensors),
            "model_cfg": config.to_open_clip(),
            "preprocess_cfg": preprocess.to_open_clip(),
            "ternary": [
                [pattern, dataclasses.replace(quantizer, dead_zone_bias=0.0).to_dict()] for pattern, quantizer in rules
            ],  # the bias is folded into that of the layer, and readers of version 1 refuse the key
            "tensors": tensors,
            "files": {path.name: weights.get(path.name) or file_entry(path) for path in sorted(building.iterdir())},
            "figures": dict(figures or {}),
            "provenance": {"versions": _versions(), **(provenance or {})},
        }
        if config.text.hf_tokenizer_name and tokenizer:
            fields["tokenizer"] = tokenizer.options
        # Last: on an object store, the manifest makes the artifact complete.
        (building / MANIFEST).write_bytes(dump_manifest(fields))


def _spooled(spool: IO[bytes], array: npt.NDArray[np.uint8]) -> LazyArray:
    """Append bytes to a temporary file, and return them as a lazy array."""
    start, size = spool.seek(0, os.SEEK_END), array.size
    spool.write(array.data)

    def load() -> npt.NDArray[np.uint8]:
        spool.seek(start)
        return np.frombuffer(spool.read(size), np.uint8)

    return LazyArray(array.shape, array.dtype, load)


def read_artifact(folder: epath.PathLike, put: Callable[[Any], Any] = lambda leaf: leaf) -> Artifact:
    """Read and check a packed model; leaves are float32 arrays, `TernaryTensor` and `UniformTensor`, in NumPy.

    Every size is checked against the configuration before that many bytes are read or allocated.

    Args:
      folder: the artifact's path, local or gs://.
      put: applied to each leaf as soon as it is read, for example jax.device_put. At most one leaf is in host memory
        and on the device at the same time.

    Raises:
      ArtifactError: a file is missing or damaged, or does not match the configuration.
    """
    folder = epath.Path(folder)
    check_size(folder / MANIFEST, MAX_MANIFEST_BYTES)
    manifest = parse_manifest((folder / MANIFEST).read_bytes())
    config, preprocess, rules, shapes = describe(manifest)
    tensors = manifest["tensors"]
    check_tensors(tensors, flatten(shapes), manifest["format_version"])
    check_files(folder, manifest)
    tokenizer = _read_tokenizer(folder, manifest, config)
    leaves: dict[str, Any] = {}
    for file in WEIGHT_FILES:
        stored = open_safetensors(folder / file)
        entries = {path: entry for path, entry in tensors.items() if weight_file(entry) == file}
        names = {name for path, entry in entries.items() for name in array_names(path, entry["coding"])}
        check_names(stored, names, file, ArtifactError)
        leaves |= {path: put(decode(path, entry, stored)) for path, entry in entries.items()}
    params = jax.tree_util.tree_map_with_path(lambda key_path, _: leaves[path_of(key_path)], shapes)
    return Artifact(config, preprocess, params, rules, manifest, tokenizer)


def read_artifact_tokenizer(folder: epath.PathLike) -> FileTokenizer | None:
    """Return the tokenizer of an artifact without its weights; None if it has none, or CLIP's own.

    Raises:
      ArtifactError: the manifest or the tokenizer's file is damaged.
    """
    folder = epath.Path(folder)
    check_size(folder / MANIFEST, MAX_MANIFEST_BYTES)
    manifest = parse_manifest((folder / MANIFEST).read_bytes())
    tokenizer = _read_tokenizer(folder, manifest, describe(manifest).config)
    if tokenizer and manifest["files"][tokenizer.file] != file_entry(folder / tokenizer.file):
        raise ArtifactError(f"{folder / tokenizer.file} is damaged: it differs from its entry in {MANIFEST}")
    return tokenizer


def _read_tokenizer(folder: epath.Path, manifest: Mapping[str, Any], config: CLIPConfig) -> FileTokenizer | None:
    """Return the artifact's tokenizer if it is not CLIP's own.

    Raises:
      ArtifactError: the manifest's entry is invalid, or files hold another vocabulary than CLIP's where it must be.
    """
    text = config.text
    if not text.hf_tokenizer_name:
        _check_vocabulary(folder, manifest)
        return None
    if "tokenizer" not in manifest:
        return None

    def read(name: str) -> bytes:
        if name not in manifest["files"]:
            raise ValueError(f"files lacks {name}, which tokenizer.file names")
        check_size(folder / name, MAX_OTHER_BYTES)
        return (folder / name).read_bytes()

    try:
        return FileTokenizer.from_options(
            manifest["tokenizer"],
            read,
            name=text.hf_tokenizer_name,
            context_length=text.context_length,
            vocab_size=text.vocab_size,
        )
    except ValueError as error:
        raise ArtifactError(f"{folder / MANIFEST}: {error}") from None


def _check_vocabulary(folder: epath.Path, manifest: Mapping[str, Any]) -> None:
    """Raise ArtifactError if the artifact's tokenizer files hold another vocabulary than CLIP's."""
    for name, text in vocabulary_files().items():
        entry = manifest["files"].get(name)
        if entry is None or entry["sha256"] == hashlib.sha256(text.encode()).hexdigest():
            continue
        try:
            same = is_vocabulary(name, (folder / name).read_bytes().decode())
        except (ValueError, RecursionError):
            same = False
        if not same:
            raise ArtifactError(f"{folder / name} holds another vocabulary: only CLIP's is supported")


def _write_preprocessor_config(folder: epath.Path, preprocess: Preprocess) -> None:
    try:
        fields = preprocess.to_hugging_face()
    # No file is better than a wrong one: transformers cannot express every preprocessing.
    except ValueError:
        return
    (folder / "preprocessor_config.json").write_text(json.dumps(fields, indent=2) + "\n")


def _versions() -> dict[str, str]:
    return {
        name: importlib.metadata.version(name) for name in ("tclip-jax", "jax", "numpy", "safetensors", "zstandard")
    }
