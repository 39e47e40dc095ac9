"""Write, parse and validate tclip.json, the manifest of an artifact."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from tclip_jax import keys
from tclip_jax.artifacts.pack import flatten
from tclip_jax.data.images import Preprocess
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TERNARIZABLE, TernaryRules, input_axis, matrix_shape
from tclip_jax.schema import check_names
from tclip_jax.ternary import Quantizer

MANIFEST = "tclip.json"
TERNARY_CODING, FLOAT_CODING = "base3+zstd", "planes+zstd"
UNIFORM_CODINGS = {"int4+zstd": 4, "int8+zstd": 8}  # and their bits
# The format version that introduced each coding. An artifact has the lowest version that has all of its codings.
CODING_VERSIONS = {TERNARY_CODING: 1, FLOAT_CODING: 1, **dict.fromkeys(UNIFORM_CODINGS, 2)}
FORMAT_VERSION = max(CODING_VERSIONS.values())

MAX_MANIFEST_BYTES = 4 * 2**20
MAX_PARAMETERS = 2**32

_NO_DIGEST = "0" * 64


class ArtifactError(ValueError):
    """An artifact cannot be read or written. The message is one line: file or key, fault, and what would be right."""


class DeclaredModel(NamedTuple):
    """The model that a manifest describes; `shapes` is its parameter tree with `ShapeDtypeStruct` leaves."""

    config: CLIPConfig
    preprocess: Preprocess
    rules: TernaryRules
    shapes: dict[str, Any]


def dump_manifest(fields: Mapping[str, Any]) -> bytes:
    """Return the bytes of tclip.json. Its last key, "sha256", is their digest with 64 zeros in the digest's place.

    Args:
      fields: the other keys; `format_version` is 1 if they lack it, see `lowest_version`.
    """
    head = {"format": "tclip", "format_version": 1}
    text = json.dumps({**head, **fields, "sha256": _NO_DIGEST}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    start = text.rindex(_NO_DIGEST)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return (text[:start] + digest + text[start + len(digest) :]).encode()


def lowest_version(tensors: Mapping[str, Any]) -> int:
    """Return the lowest format version that has the codings of all tensors."""
    return max((CODING_VERSIONS[entry["coding"]] for entry in tensors.values()), default=1)


def parse_manifest(data: bytes) -> dict[str, Any]:
    """Return the fields of tclip.json.

    Raises:
      ArtifactError: the bytes are not JSON, have another format or a newer version, do not match their checksum, or
        lack a required object.
    """
    try:
        manifest = json.loads(data.decode(), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{MANIFEST} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != "tclip":
        raise ArtifactError(f'{MANIFEST} does not describe an artifact: it must be an object with "format": "tclip"')
    version = manifest.get("format_version")
    # Before the checksum, because the version defines how to compute it.
    if type(version) is not int or version not in range(1, FORMAT_VERSION + 1):  # true and 1.0 equal 1
        raise ArtifactError(
            f"{MANIFEST}: format_version is {_short(version)}, and this tclip_jax reads 1 to {FORMAT_VERSION}: "
            "a newer artifact needs a newer tclip_jax"
        )
    declared = manifest.get("sha256")
    if not isinstance(declared, str) or not re.fullmatch("[0-9a-f]{64}", declared):
        raise ArtifactError(f"{MANIFEST}: sha256 is {_short(declared)}: it must be 64 hexadecimal digits")
    before, separator, after = data.rpartition(declared.encode())
    if not separator or hashlib.sha256(before + _NO_DIGEST.encode() + after).hexdigest() != declared:
        raise ArtifactError(f"{MANIFEST} is damaged: its bytes do not have the sha256 that it states")
    optional = manifest.keys() & {"figures", "provenance", "tokenizer"}
    for key in ("model_cfg", "preprocess_cfg", "tensors", "files", *optional):
        if not isinstance(manifest.get(key), dict):
            raise ArtifactError(f"{MANIFEST}: {key} is {_short(manifest.get(key))}: it must be an object")
    return manifest


def content_digest(manifest: Mapping[str, Any]) -> str:
    """Return the digest of what an artifact's manifest says of its model.

    This is its configuration, preprocessing and tensors, and a tokenizer that is not CLIP's own.
    """
    parts = {key: manifest[key] for key in ("model_cfg", "preprocess_cfg", "tensors")}
    if options := manifest.get("tokenizer"):
        parts["tokenizer"] = [options, manifest["files"].get(str(options.get("file")))]
    return keys.digest(parts)


def describe(manifest: Mapping[str, Any]) -> DeclaredModel:
    """Return the model that a manifest describes, with its parameter shapes, without allocating parameters.

    Raises:
      ArtifactError: the configuration is invalid, or the model has more than `MAX_PARAMETERS` parameters.
    """
    try:
        key = "model_cfg"
        config = CLIPConfig.from_open_clip(manifest[key])
        shapes = param_shapes(config)
        key = "preprocess_cfg"
        preprocess = Preprocess.from_open_clip(manifest[key], config.vision.image_size)
        key = "ternary"
        # Compile the pattern but do not match it: a hostile regex can run forever.
        rules = tuple((re.compile(pattern).pattern, Quantizer(**fields)) for pattern, fields in manifest[key])
    # The manifest may hold values of any type, and Flax and Pillow raise many kinds of errors for them.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ArtifactError(f"{MANIFEST}: {key} is not usable: {type(error).__name__}: {reason}") from None
    for path, leaf in flatten(shapes).items():
        if min(leaf.shape, default=1) < 1:
            raise ArtifactError(
                f"{MANIFEST}: model_cfg gives {path} the shape {leaf.shape}: every axis must be at least 1"
            )
    count = sum(math.prod(leaf.shape) for leaf in flatten(shapes).values())
    if count > MAX_PARAMETERS:
        raise ArtifactError(f"{MANIFEST}: model_cfg has {count} parameters: at most {MAX_PARAMETERS} are read")
    check_image_size(config, preprocess)
    return DeclaredModel(config, preprocess, rules, shapes)


def check_image_size(config: CLIPConfig, preprocess: Preprocess) -> None:
    """Raise ArtifactError if the preprocessing gives images of another size than the model takes."""
    if preprocess.size != config.vision.image_size:
        raise ArtifactError(f"preprocess_cfg size is {preprocess.size}: the model's is {config.vision.image_size}")


def check_tensors(tensors: Mapping[str, Any], shapes: Mapping[str, Any], version: int = FORMAT_VERSION) -> None:
    """Raise ArtifactError unless `tensors` has an entry for each parameter of `shapes`, valid in a format version."""
    check_names(tensors, shapes, f"{MANIFEST}: the list of tensors", ArtifactError)
    codings = [coding for coding, introduced in CODING_VERSIONS.items() if introduced <= version]
    for path, entry in tensors.items():
        _check_tensor(f"{MANIFEST}: {path}", path, entry, shapes[path].shape, codings)


def _check_tensor(where: str, path: str, entry: Any, shape: tuple[int, ...], codings: list[str]) -> None:
    if not isinstance(entry, dict):
        raise ArtifactError(f"{where} is {_short(entry)}: it must be an object")
    _require(where, entry, "coding", codings)
    if entry["coding"] != FLOAT_CODING:
        shape = matrix_shape(shape)
    _require(where, entry, "shape", [list(shape)])
    _require(where, entry, "dtype", ["float16", "float32"])
    if entry["coding"] == FLOAT_CODING:
        return
    if path not in TERNARIZABLE:
        raise ArtifactError(f"{where} has coding {entry['coding']}: this parameter must be {FLOAT_CODING}")
    axis, group = input_axis(path), entry.get("group")
    _require(where, entry, "axis", [axis])
    if type(group) is not int or not 1 <= group <= shape[axis]:
        raise ArtifactError(f"{where} has group {_short(group)}: it must be an integer from 1 to {shape[axis]}")
    groups = [*shape]
    groups[axis] = -(-shape[axis] // group)
    one_per_tensor = [[*shape[:-2], 1, 1]] if group == shape[axis] else []
    _require(where, entry, "scale_shape", [groups, *one_per_tensor])


def _require(where: str, entry: Mapping[str, Any], key: str, choices: list[Any]) -> None:
    # Compare as JSON: in Python 2.0 == 2 and True == 1, and neither is a valid size.
    if json.dumps(entry.get(key)) not in map(json.dumps, choices):
        raise ArtifactError(f"{where} has {key} {_short(entry.get(key))}: it must be {' or '.join(map(str, choices))}")


def _short(value: Any) -> str:
    return f"{value!r:.80}"


def refuse_constant(name: str) -> NoReturn:
    """Raise ValueError for NaN and Infinity; for `parse_constant` of json.loads, which accepts them otherwise."""
    raise ValueError(f"{name} is not a JSON number")
