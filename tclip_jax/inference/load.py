"""Load a model from an artifact, a run, or a checkpoint of another library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from tclip_jax import keys
from tclip_jax.artifacts.format import read_artifact
from tclip_jax.artifacts.manifest import MANIFEST, content_digest
from tclip_jax.artifacts.pack import flatten, pack_params
from tclip_jax.data.images import Preprocess
from tclip_jax.data.sources.content import contents
from tclip_jax.inference.model import Model
from tclip_jax.interop.checkpoints import Checkpoint, is_checkpoint, open_checkpoint
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TernaryRules, is_learned_scale
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
    """

    config: CLIPConfig
    preprocess: Preprocess
    params: dict[str, Any]
    rules: TernaryRules = ()
    origin: Mapping[str, Any] = {}
    figures: Mapping[str, Any] = {}
    provenance: Mapping[str, Any] = {}


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
    from tclip_jax.runs.read import read_weights  # imports Orbax, which artifacts do not need

    step, run, params = read_weights(path, mesh)
    return step, Model(run.model, run.preprocess, params, run.rules)


def load_stored(path: epath.PathLike) -> Stored:
    """Load a model to host memory, to write or initialise weights. Weights of other libraries are read lazily."""
    if (epath.Path(path) / MANIFEST).exists():
        with together():
            artifact = read_artifact(path, jax.device_put)
        params = jax.device_get(artifact.params)  # no copy on a CPU
        origin, manifest = _artifact_origin(path, artifact.manifest), artifact.manifest
        recorded = (manifest.get("figures", {}), manifest.get("provenance", {}))
        return Stored(artifact.config, artifact.preprocess, params, (), origin, *recorded)
    if is_checkpoint(path):
        with together():
            checkpoint = open_checkpoint(path)
            origin = _file_origin(path, checkpoint)
        return Stored(checkpoint.config, checkpoint.preprocess, checkpoint.params, (), origin, {}, origin)
    from tclip_jax.runs.read import split_step, weights_origin
    from tclip_jax.runs.record import run_figures, run_provenance

    (step, model), (workdir, _, average) = load_run(path), split_step(path)
    figures, provenance = (get(workdir, step, average=average) for get in (run_figures, run_provenance))
    params, origin = jax.device_get(model.params), weights_origin(path, step)
    return Stored(model.config, model.preprocess, params, model.rules, origin, figures, provenance)


def load_packed(path: epath.PathLike) -> Stored:
    """Load a model as `load_stored` does, and pack its latent weights. Each of them is freed once it is packed."""
    config, preprocess, params, rules, *about = load_stored(path)
    if rules:
        leaves, packed = flatten(params), dict[str, Any]()
        del params
        for name in [name for name in leaves if not is_learned_scale(name)]:
            part = {each: leaves.pop(each) for each in (name, f"{name}_scale") if each in leaves}
            packed |= flatten(pack_params(unflatten_dict(part, sep="/"), rules))
        params = unflatten_dict(packed, sep="/")
    return Stored(config, preprocess, params, (), *about)


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
        model = Model(artifact.config, artifact.preprocess, artifact.params)
        return model, _artifact_origin(path, artifact.manifest)
    if is_checkpoint(path):
        with together():
            checkpoint = open_checkpoint(path, like=like)
            params, origin = jax.tree.map(np.asarray, checkpoint.params), _file_origin(path, checkpoint)
        return Model(checkpoint.config, checkpoint.preprocess, params), origin
    from tclip_jax.runs.read import weights_origin

    step, model = load_run(path, mesh)
    return model, weights_origin(path, step)


def _artifact_origin(path: epath.PathLike, manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {"source": str(path), "content": content_digest(manifest)}


def _file_origin(path: epath.PathLike, checkpoint: Checkpoint) -> dict[str, Any]:
    content = keys.recipe(
        model=checkpoint.config,
        preprocess=checkpoint.preprocess,
        files=list(contents(str(file) for file in checkpoint.files)),
    )
    return {"source": str(path), "content": keys.digest(content)}
