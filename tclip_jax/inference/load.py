"""A model from what holds one: an artifact, a run, or a checkpoint of another library."""

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
from tclip_jax.artifacts.manifest import MANIFEST
from tclip_jax.artifacts.pack import flatten, pack_params
from tclip_jax.data.images import Preprocess
from tclip_jax.data.sources.content import contents
from tclip_jax.inference.model import Model
from tclip_jax.interop.checkpoints import Checkpoint, is_checkpoint, open_checkpoint
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TernaryRules, is_learned_scale
from tclip_jax.parallel.agreement import together


class Stored(NamedTuple):
    """A model on the host.

    Attributes:
      params: packed, or floats, which are NumPy or lazy; those that `rules` name are latent.
      origin: where it comes from, see `load_known`.
      figures: what an artifact or a run says was measured of it.
      provenance: what it says of its making; of another library's checkpoint its origin.
    """

    config: CLIPConfig
    preprocess: Preprocess
    params: dict[str, Any]
    rules: TernaryRules = ()
    origin: Mapping[str, Any] = {}
    figures: Mapping[str, Any] = {}
    provenance: Mapping[str, Any] = {}


def load_run(path: epath.PathLike, mesh: Mesh | None = None) -> tuple[int, Model]:
    """A step of a run, see `split_step`, and its model: latent weights over `mesh`, the rules that make them ternary.

    Raises:
      FileNotFoundError: `path` is no run.
      ValueError: the step is not there, or broken.
    """
    from tclip_jax.runs.read import read_weights  # Orbax, which an artifact needs not

    step, run, params = read_weights(path, mesh)
    return step, Model(run.model, run.preprocess, params, run.rules)


def load_stored(path: epath.PathLike) -> Stored:
    """As `load_model`, for what writes weights or starts from them: those of another library are read when needed."""
    if (epath.Path(path) / MANIFEST).exists():
        with together():
            artifact = read_artifact(path, jax.device_put)
        params = jax.device_get(artifact.params)  # on a CPU the same memory
        origin, manifest = _artifact_origin(path, artifact.manifest), artifact.manifest
        made = (manifest.get("figures", {}), manifest.get("provenance", {}))
        return Stored(artifact.config, artifact.preprocess, params, (), origin, *made)
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
    """As `load_stored`, what its rules name being packed; each latent weight is dropped when that is done."""
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
    """The model of an artifact, its trits as they are stored; of a run's workdir; or of another library's checkpoint.

    Args:
      path: a folder with tclip.json; with a run's config.json, or that as of `split_step`; or what `open_checkpoint`
        opens.
      mesh: for the latent weights of a run.
      like: as of `open_checkpoint`, for a file that does not say which model it is.

    Raises:
      FileNotFoundError: `path` is none of these.
      ValueError: it is broken; one line naming the file and what was expected.
    """
    return load_known(path, mesh, like=like)[0]


def load_known(
    path: epath.PathLike, mesh: Mesh | None = None, *, like: str | None = None
) -> tuple[Model, dict[str, Any]]:
    """As `load_model`, with where the model comes from.

    Returns:
      The model, and {"source": `path`, "content": a digest of its weights and configuration as they are stored}, of a
      run with its "step". Artifact, run and checkpoint of the same weights differ.
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
    made_of = {key: manifest[key] for key in ("model_cfg", "preprocess_cfg", "tensors")}
    return {"source": str(path), "content": keys.digest(made_of)}


def _file_origin(path: epath.PathLike, checkpoint: Checkpoint) -> dict[str, Any]:
    made_of = keys.recipe(
        model=checkpoint.config,
        preprocess=checkpoint.preprocess,
        files=list(contents(str(file) for file in checkpoint.files)),
    )
    return {"source": str(path), "content": keys.digest(made_of)}
