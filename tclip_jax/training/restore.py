"""A model from whatever holds one: a training run, an artifact, or another library's checkpoint."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from tclip_jax import keys
from tclip_jax.artifacts.format import read_artifact
from tclip_jax.artifacts.manifest import MANIFEST
from tclip_jax.artifacts.model import Model
from tclip_jax.artifacts.pack import flatten, pack_params
from tclip_jax.data.images import Preprocess
from tclip_jax.data.sources.content import contents
from tclip_jax.interop.checkpoints import Checkpoint, is_checkpoint, open_checkpoint
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TernaryRules, is_learned_scale
from tclip_jax.parallel.failures import together
from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.parallel.rules import tree_shardings
from tclip_jax.runs.checkpoints import load_params
from tclip_jax.runs.checksums import CheckpointError, files_below
from tclip_jax.runs.policy import CheckpointConfig, ranked
from tclip_jax.runs.record import HISTORY
from tclip_jax.runs.steps import all_steps
from tclip_jax.training.config import RunConfig, run_config
from tclip_jax.training.provenance import run_figures, run_provenance

_logger = logging.getLogger(__name__)


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


def read_config(workdir: epath.PathLike) -> RunConfig:
    """The resolved configuration of a run.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not JSON, or not a configuration of this version.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected the workdir of `tclip train`, or an artifact")
    try:
        return run_config(ml_collections.ConfigDict(json.loads(path.read_text())))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


class Place(NamedTuple):
    """Where a run's weights are.

    Attributes:
      step: "best" of the saved ones, a number, or "", the newest.
      average: of the weights (`config.optimizer.ema_decay`), not these.
    """

    workdir: epath.Path
    step: str = ""
    average: bool = False


def split_step(path: epath.PathLike) -> Place:
    """Of "runs/a", "runs/a@best", "runs/a@1200", "runs/a@average", "runs/a@best-average" or "runs/a@1200-average"."""
    found = re.fullmatch(r"(.+)@(?:(best|\d+)(-average)?|(average))", str(path), re.DOTALL)
    if not found or epath.Path(path).exists():
        return Place(epath.Path(path))
    workdir, step, *average = found.groups()
    return Place(epath.Path(workdir), step or "", any(average))


def load_run(path: epath.PathLike, mesh: Mesh | None = None) -> tuple[int, Model]:
    """A step of a run, see `split_step`, and its model: latent weights over `mesh`, the rules that make them ternary.

    Raises:
      FileNotFoundError: `path` is no run.
      ValueError: the step is not there, or broken.
    """
    workdir, step, average = split_step(path)
    with together():
        run = read_config(workdir)
    shapes = param_shapes(run.model, run.rules)
    shardings = tree_shardings(shapes, mesh or make_mesh(devices=jax.local_devices()[:1]))
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    wanted = _best_steps(workdir, run.checkpoint) if step == "best" else [int(step)] if step else None
    found, params = load_params(workdir / "checkpoints", abstract, wanted, average=average)
    if average and not (workdir / HISTORY).exists():
        _logger.warning("%s: an older version trained it, whose averages lean towards the initial weights", workdir)
    return found, Model(run.model, run.preprocess, params, run.rules)


def _best_steps(workdir: epath.Path, config: CheckpointConfig) -> list[int]:
    """The best first."""
    from tclip_jax.training.telemetry import read_metrics  # with TensorBoard's writer, which imports PyTorch

    metric, steps = config.best_metric, all_steps(workdir / "checkpoints")
    scores = {line["step"]: line[metric] for line in read_metrics(workdir) if line.get(metric) is not None}
    best = ranked(steps, scores, config)
    if not best:
        raise CheckpointError(f"{workdir}: metrics.jsonl has {metric} of none of the saved steps {steps}")
    return best[::-1]


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
    (step, model), (workdir, _, average) = load_run(path), split_step(path)
    figures, provenance = (get(workdir, step, average=average) for get in (run_figures, run_provenance))
    params, origin = jax.device_get(model.params), _run_origin(path, step)
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
    step, model = load_run(path, mesh)
    return model, _run_origin(path, step)


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


def _run_origin(path: epath.PathLike, step: int) -> dict[str, Any]:
    workdir, _, average = split_step(path)
    folder, config = workdir / "checkpoints" / str(step) / ("average" if average else "params"), read_config(workdir)
    files = {name: str(file) for name, file in files_below(folder).items()}
    made_of = keys.recipe(
        model=config.model,
        preprocess=config.preprocess,
        rules=config.rules,
        files=dict(zip(files, contents(files.values()), strict=True)),
    )
    return {"source": str(path), "step": step, "content": keys.digest(made_of)}
