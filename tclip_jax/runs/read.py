"""The weights of a run: selecting a step, reading it, and identifying its content."""

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
from tclip_jax.runs.tokenizer import kept_tokenizer

_logger = logging.getLogger(__name__)


class StepPath(NamedTuple):
    """A step of a run.

    Attributes:
      workdir: workdir of the run.
      step: a number, "best" for the best saved step, or "" for the newest.
      average: whether to read the moving average of the weights (`config.optimizer.ema_decay`) instead of the weights.
    """

    workdir: epath.Path
    step: str = ""
    average: bool = False


def split_step(path: epath.PathLike) -> StepPath:
    """Parse "runs/a", "runs/a@best", "runs/a@1200", "runs/a@average", "runs/a@best-average", "runs/a@1200-average"."""
    match = re.fullmatch(r"(.+)@(?:(best|\d+)(-average)?|(average))", str(path), re.DOTALL)
    if not match or epath.Path(path).exists():
        return StepPath(epath.Path(path))
    workdir, step, *average = match.groups()
    return StepPath(epath.Path(workdir), step or "", any(average))


class Weights(NamedTuple):
    """The latent weights of one step of a run, and the run's configuration."""

    step: int
    config: RunConfig
    params: Any


def read_weights(path: epath.PathLike, mesh: Mesh | None = None) -> Weights:
    """Return the weights of a step of a run. A collective.

    Args:
      path: a workdir and an optional step, see `split_step`.
      mesh: the devices over which the weights are sharded; None for a single device.

    Raises:
      FileNotFoundError: `path` is not a run.
      ValueError: the step does not exist, or is damaged.
    """
    workdir, step, average = split_step(path)
    with together():
        run = read_config(workdir)
    shapes = param_shapes(run.model, run.rules)
    shardings = tree_shardings(shapes, mesh or make_mesh(devices=jax.local_devices()[:1]))
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    steps = _best_steps(workdir, run.checkpoint) if step == "best" else [int(step)] if step else None
    number, params = load_params(workdir / "checkpoints", abstract, steps, average=average)
    if average and not (workdir / HISTORY).exists():
        _logger.warning("%s: an older version trained it, whose averages lean towards the initial weights", workdir)
    return Weights(number, run, params)


def weights_origin(path: epath.PathLike, step: int) -> dict[str, Any]:
    """Return {"source", "step", "content"} of the weights that `read_weights` read; "content" is a digest."""
    workdir, _, average = split_step(path)
    folder, config = workdir / "checkpoints" / str(step) / ("average" if average else "params"), read_config(workdir)
    tokenizer = kept_tokenizer(workdir, config.model.text)
    files = {name: str(file) for name, file in files_below(folder).items()}
    made_by = keys.recipe(
        model=config.model,
        preprocess=config.preprocess,
        rules=config.rules,
        files=dict(zip(files, contents(files.values()), strict=True)),
        **({"tokenizer": tokenizer.digest} if tokenizer else {}),
    )
    return {"source": str(path), "step": step, "content": keys.digest(made_by)}


def _best_steps(workdir: epath.Path, config: CheckpointConfig) -> list[int]:
    """Return the saved steps that have the metric, the best first."""
    metric, steps = config.best_metric, all_steps(workdir / "checkpoints")
    scores = {line["step"]: line[metric] for line in read_metrics(workdir) if line.get(metric) is not None}
    best = ranked(steps, scores, config)
    if not best:
        raise CheckpointError(f"{workdir}: metrics.jsonl has no {metric} for the saved steps {steps}")
    return best[::-1]
