"""The weights of a run: which step of it, and where they come from."""

from __future__ import annotations

import logging
import re
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh

from tclip_jax import keys
from tclip_jax.data.sources.content import contents
from tclip_jax.models.clip import param_shapes
from tclip_jax.parallel.agreement import together
from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.parallel.sharding import tree_shardings
from tclip_jax.runs.checkpoints import CheckpointConfig, load_params, ranked
from tclip_jax.runs.checksums import CheckpointError, files_below
from tclip_jax.runs.config import RunConfig, read_config
from tclip_jax.runs.record import HISTORY, read_metrics
from tclip_jax.runs.steps import all_steps

_logger = logging.getLogger(__name__)


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


class Weights(NamedTuple):
    """The latent weights of one step of a run."""

    step: int
    config: RunConfig
    params: Any


def read_weights(path: epath.PathLike, mesh: Mesh | None = None) -> Weights:
    """The weights of a step of a run, see `split_step`, over `mesh`, or on one device. A collective.

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
    return Weights(found, run, params)


def weights_origin(path: epath.PathLike, step: int) -> dict[str, Any]:
    """{"source", "step", "content"} of the weights that `read_weights` found at `path`."""
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


def _best_steps(workdir: epath.Path, config: CheckpointConfig) -> list[int]:
    """The best first."""
    metric, steps = config.best_metric, all_steps(workdir / "checkpoints")
    scores = {line["step"]: line[metric] for line in read_metrics(workdir) if line.get(metric) is not None}
    best = ranked(steps, scores, config)
    if not best:
        raise CheckpointError(f"{workdir}: metrics.jsonl has {metric} of none of the saved steps {steps}")
    return best[::-1]
