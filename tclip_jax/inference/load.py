"""Load a model from an artifact, a run, or a checkpoint of another library."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from tclip_jax import keys
from tclip_jax.artifacts.files import check_size
from tclip_jax.artifacts.format import read_artifact, read_artifact_tokenizer
from tclip_jax.artifacts.manifest import MANIFEST, MAX_MANIFEST_BYTES, content_digest, describe, parse_manifest
from tclip_jax.artifacts.pack import flatten, pack_params
from tclip_jax.data.file_tokenizer import FileTokenizer
from tclip_jax.data.images import Preprocess
from tclip_jax.data.sources.content import contents
from tclip_jax.inference.model import Model
from tclip_jax.interop.checkpoints import HUB_PREFIX, Checkpoint, described_by, fetch, is_checkpoint, open_checkpoint
from tclip_jax.interop.tokenizer_files import TOKENIZER_CONFIG, read_tokenizer
from tclip_jax.models.config import CLIPConfig, TextConfig
from tclip_jax.models.ternary_rules import TernaryRules
from tclip_jax.parallel.agreement import together


class Stored(NamedTuple):
    """A model in host memory.

    Attributes:
      config: the shape of both towers.
      preprocess: the preprocessing.
      params: packed tensors, or NumPy or lazy floats. Floats that match `rules` are latent weights.
      rules: the ternary rules of latent weights; empty for a packed or full-precision model.
      origin: source and content digest; see `load_known`.
      figures: metrics that the artifact or run records.
      provenance: how the artifact or run was made; for a checkpoint of another library its origin.
      tokenizer: what tokenizes texts, if it is not CLIP's own; see `Model`.
    """

    config: CLIPConfig
    preprocess: Preprocess
    params: dict[str, Any]
    rules: TernaryRules = ()
    origin: Mapping[str, Any] = {}
    figures: Mapping[str, Any] = {}
    provenance: Mapping[str, Any] = {}
    tokenizer: FileTokenizer | None = None


class Architecture(NamedTuple):
    """A model without its weights; `rules` selects the ternary ones."""

    config: CLIPConfig
    preprocess: Preprocess
    rules: TernaryRules = ()


def find_architecture(path: str) -> Architecture:
    """Return the architecture of an artifact, a run, or a checkpoint of another library, without reading weights.

    Raises:
      FileNotFoundError: `path` is none of these.
      ValueError: its metadata is damaged or not supported.
    """
    if (manifest := epath.Path(path) / MANIFEST).exists():
        check_size(manifest, MAX_MANIFEST_BYTES)
        artifact = describe(parse_manifest(manifest.read_bytes()))
        return Architecture(artifact.config, artifact.preprocess)
    if is_checkpoint(path):
        checkpoint = open_checkpoint(path)
        return Architecture(checkpoint.config, checkpoint.preprocess)
    from tclip_jax.runs.config import read_config
    from tclip_jax.runs.read import split_step

    run = read_config(split_step(path).workdir)
    return Architecture(run.model, run.preprocess, run.rules)


def load_run(path: epath.PathLike, mesh: Mesh | None = None) -> tuple[int, Model]:
    """Load a step of a run.

    Args:
      path: workdir of a run, optionally with a step; see `split_step`.
      mesh: the mesh of the parameters.

    Returns:
      The step, and the model with latent weights and ternary rules.

    Raises:
      FileNotFoundError: `path` is not a run.
      ValueError: the step does not exist or is damaged.
    """
    from tclip_jax.runs.read import read_weights, split_step  # imports Orbax, which artifacts do not need
    from tclip_jax.runs.tokenizer import kept_tokenizer

    step, run, params = read_weights(path, mesh)
    tokenizer = kept_tokenizer(split_step(path).workdir, run.model.text)
    return step, Model(run.model, run.preprocess, params, run.rules, tokenizer)


def load_stored(path: epath.PathLike) -> Stored:
    """Load a model to host memory, to write or initialise weights. Weights of other libraries are read lazily."""
    if (epath.Path(path) / MANIFEST).exists():
        with together():
            artifact = read_artifact(path, jax.device_put)
        params = jax.device_get(artifact.params)  # no copy on a CPU
        origin, manifest = _artifact_origin(path, artifact.manifest), artifact.manifest
        recorded = (manifest.get("figures", {}), manifest.get("provenance", {}))
        return Stored(artifact.config, artifact.preprocess, params, (), origin, *recorded, artifact.tokenizer)
    if is_checkpoint(path):
        with together():
            checkpoint = open_checkpoint(path)
            origin = _file_origin(path, checkpoint)
        shape = (checkpoint.config, checkpoint.preprocess)
        return Stored(*shape, checkpoint.params, (), origin, {}, origin, checkpoint.tokenizer)
    from tclip_jax.runs.read import split_step, weights_origin
    from tclip_jax.runs.record import run_figures, run_provenance

    (step, model), (workdir, _, average) = load_run(path), split_step(path)
    figures, provenance = (get(workdir, step, average=average) for get in (run_figures, run_provenance))
    params, origin = jax.device_get(model.params), weights_origin(path, step)
    described = (origin, figures, provenance, model.tokenizer)
    return Stored(model.config, model.preprocess, params, model.rules, *described)


def load_packed(path: epath.PathLike) -> Stored:
    """Load a model as `load_stored` does, and pack its latent weights. Each of them is freed once it is packed."""
    stored = load_stored(path)
    if not stored.rules:
        return stored
    leaves, packed, rules = flatten(stored.params), dict[str, Any](), stored.rules
    stored = stored._replace(params={}, rules=())
    layers: dict[str, list[str]] = {}
    for name in leaves:
        layers.setdefault(name.rpartition("/")[0], []).append(name)
    for names in layers.values():  # a kernel, its learned scale, and the bias into which it may fold
        part = {name: leaves.pop(name) for name in names}
        packed |= flatten(pack_params(unflatten_dict(part, sep="/"), rules))
    return stored._replace(params=unflatten_dict(packed, sep="/"))


def load_model(path: epath.PathLike, mesh: Mesh | None = None, *, like: str | None = None) -> Model:
    """Load the model of an artifact, a run, or a checkpoint of another library. Artifacts keep their stored packing.

    Args:
      path: folder of an artifact (with tclip.json); workdir of a run (with config.json), optionally with a step, see
        `split_step`; or a checkpoint for `open_checkpoint`.
      mesh: the mesh of the latent weights of a run.
      like: argument of `open_checkpoint`, for a file that does not identify its model.

    Raises:
      FileNotFoundError: `path` is none of these.
      ValueError: the model is damaged; the message names the file and what was expected.
    """
    return load_known(path, mesh, like=like)[0]


def load_known(
    path: epath.PathLike, mesh: Mesh | None = None, *, like: str | None = None
) -> tuple[Model, dict[str, Any]]:
    """Load a model as `load_model` does, and return its origin too.

    Returns:
      The model and its origin: "source", which is `path`, and "content", a digest of the stored weights and
      configuration, and for a run its "step". The digests of an artifact, a run and a checkpoint of the same weights
      differ.
    """
    if (epath.Path(path) / MANIFEST).exists():
        with together():
            artifact = read_artifact(path)
        model = Model(artifact.config, artifact.preprocess, artifact.params, (), artifact.tokenizer)
        return model, _artifact_origin(path, artifact.manifest)
    if is_checkpoint(path):
        with together():
            checkpoint = open_checkpoint(path, like=like)
            params, origin = jax.tree.map(np.asarray, checkpoint.params), _file_origin(path, checkpoint)
        return Model(checkpoint.config, checkpoint.preprocess, params, (), checkpoint.tokenizer), origin
    from tclip_jax.runs.read import weights_origin

    step, model = load_run(path, mesh)
    return model, weights_origin(path, step)


def load_tokenizer(path: epath.PathLike, text: TextConfig) -> FileTokenizer | None:
    """Return the tokenizer of an artifact, a run, a checkpoint, or a folder with a tokenizer alone, for a text tower.

    Args:
      path: as in `load_model`.
      text: the text tower, which has another tokenizer than CLIP's.

    Raises:
      FileNotFoundError: `path` does not exist.
      ValueError: the tokenizer is damaged, or does not fit the text tower.
    """
    hub = str(path).startswith(HUB_PREFIX)
    folder = fetch(str(path), weights=False) if hub else epath.Path(path)
    if (folder / MANIFEST).exists():
        tokenizer = read_artifact_tokenizer(path)
    elif hub or is_checkpoint(path) or (folder / TOKENIZER_CONFIG).exists():
        tokenizer = read_tokenizer(folder, described_by(folder), text) if folder.is_dir() else None
    else:
        from tclip_jax.runs.config import read_config
        from tclip_jax.runs.read import split_step
        from tclip_jax.runs.tokenizer import kept_tokenizer

        workdir = split_step(path).workdir
        tokenizer = kept_tokenizer(workdir, read_config(workdir).model.text)
    if tokenizer is None:
        return None
    tokenizer = dataclasses.replace(
        tokenizer, name=text.hf_tokenizer_name, context_length=text.context_length, vocab_size=text.vocab_size
    )
    try:
        tokenizer.check()
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    return tokenizer


def _artifact_origin(path: epath.PathLike, manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {"source": str(path), "content": content_digest(manifest)}


def _file_origin(path: epath.PathLike, checkpoint: Checkpoint) -> dict[str, Any]:
    content = keys.recipe(
        model=checkpoint.config,
        preprocess=checkpoint.preprocess,
        files=list(contents(str(file) for file in checkpoint.files)),
        **({"tokenizer": checkpoint.tokenizer.digest} if checkpoint.tokenizer else {}),
    )
    return {"source": str(path), "content": keys.digest(content)}
