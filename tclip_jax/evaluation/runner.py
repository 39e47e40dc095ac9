"""A model over many data sets: one after the other, resumable, and a failure of one stops no other."""

from __future__ import annotations

import dataclasses
import logging
import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from etils import epath

from tclip_jax.data.sources import Source, digest
from tclip_jax.evaluation.encoder import Encoder
from tclip_jax.evaluation.results import SUMMARY, Predictions, Result, find_result, result_path, write_result
from tclip_jax.evaluation.suite import DATASETS, Dataset
from tclip_jax.evaluation.tasks import Task
from tclip_jax.evaluation.zero_shot import EVALUATORS
from tclip_jax.keys import Recipe, recipe
from tclip_jax.parallel.agreement import allgather_json, together
from tclip_jax.storage import dump_json, write_atomic

EVALUATION = 1  # raised with every change of what a metric of the same embeddings is, or an embedding of the same image
MISSING = "missing from the export"
SURPLUS = "more than the reference has"
AVERAGES = ("acc1", "acc1_or_mean_per_class_recall")

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Report:
    """What came of every task, by name and in order.

    Attributes:
      results: what was measured, now or earlier; partial where `failed` of a result is not empty.
      errors: why there is no result, one line each.
    """

    results: dict[str, Result]
    errors: dict[str, str]

    @property
    def averages(self) -> dict[str, float]:
        """Over the classification sets that have results: CLIP_benchmark's mean of acc1, and OpenAI's and DataComp's.

        The latter takes mean_per_class_recall of caltech101, fgvc_aircraft, flowers and pets. Empty without such sets.
        """
        found = [each for each in self.results.values() if "acc1" in each.metrics]
        if not found:
            return {}
        names = [DATASETS[each.dataset].averaged if each.dataset in DATASETS else "acc1" for each in found]
        columns = (["acc1"] * len(found), names)
        return {
            average: float(np.mean([each.metrics[name] for each, name in zip(found, column, strict=True)]))
            for average, column in zip(AVERAGES, columns, strict=True)
        }

    def summary(self, model: str, weights: str, dtype: str) -> dict[str, Any]:
        """What summary.json holds: in CLIP_benchmark's schema too, so that its table of a folder has a line for it."""
        return {
            "dataset": "average",
            "model": model,
            "pretrained": weights,
            "task": "summary",
            "metrics": self.averages,
            "language": "en",
            "dtype": dtype,
            "samples": sum(result.samples for result in self.results.values()),
            "seconds": round(sum(result.seconds for result in self.results.values()), 3),
            "datasets": {name: result.metrics for name, result in self.results.items()},
            "partial": self.partial,
            "failed": self.errors,
        }

    @property
    def partial(self) -> dict[str, dict[str, int]]:
        """The results in which images do not count, and why."""
        return {name: result.failed for name, result in self.results.items() if result.failed}


def evaluate(
    encoder: Encoder,
    tasks: Sequence[Task],
    *,
    model: str,
    weights: str = "",
    out: epath.PathLike | None = None,
    title: str = "",
) -> Report:
    """Evaluates each task that has no result in `out` yet, and leaves its files there, and summary.json.

    A result that is there is taken if the same made it: the model, the data by its content, class names, templates and
    the definitions of the metrics. Its data is opened for that.

    Args:
      model: name of the model for the results.
      weights: what tells its weights from others', as `artifacts.fingerprint`.
      out: folder of the results; None to keep none.
      title: shown before the progress bar.

    Raises:
      ValueError: `out` has a result that something else made, or a broken one.
    """
    results = {} if out is None else _found(out, tasks, encoder, weights)
    left = [task for task in tasks if task.dataset.name not in results]
    errors: dict[str, str] = {}
    shown = sys.stderr.isatty() and jax.process_index() == 0
    total = sum(task.dataset.samples for task in left)
    with tqdm.tqdm(total=total, unit="image", dynamic_ncols=True, disable=not shown, leave=False) as bar:
        for task in left:
            name = task.dataset.name
            bar.set_description(f"{title} {name}".strip())
            try:
                result, predictions = _measure(encoder, task, model, weights, bar)
            except (ValueError, OSError) as error:
                if isinstance(error, OSError) and jax.process_count() > 1:
                    raise  # on this process alone, in the midst of a data set: the others wait for it, and end with it
                errors[name] = str(error)
                bar.total = (bar.total or 0) - task.dataset.samples
                if len(tasks) > 1:
                    _logger.warning("%s: no result: %s", name, error)
                continue
            results[name] = result
            if out is not None:
                with together():
                    if jax.process_index() == 0:
                        write_result(out, result, predictions)
    report = Report(
        {task.dataset.name: results[task.dataset.name] for task in tasks if task.dataset.name in results}, errors
    )
    if out is not None:
        with together():
            if jax.process_index() == 0:
                write_atomic(epath.Path(out) / SUMMARY, dump_json(report.summary(model, weights, encoder.dtype)))
    return report


class _Opened(NamedTuple):
    """A task's data, and what its content is, as `digest` has it."""

    dataset: Dataset
    source: Source
    templates: tuple[str, ...]
    content: str

    @classmethod
    def of(cls, task: Task) -> _Opened:
        dataset, source, templates = task.open()
        return cls(dataset, source, templates, digest(source))


def _made_by(encoder: Encoder, weights: str, split: str, opened: _Opened) -> Recipe:
    """What decides the metrics of a model on a data set, as results keep it.

    The size of batches and the device are left out: they move embeddings by rounding alone. `versions` has them.
    """
    return recipe(
        evaluation=EVALUATION,
        model={"weights": weights, **encoder.made_by},
        data={
            "name": opened.dataset.name,
            "split": split,
            "content": opened.content,
            "classes": opened.source.classnames,
        },
        task={"kind": opened.dataset.kind, "templates": opened.templates},
    )


def _found(out: epath.PathLike, tasks: Sequence[Task], encoder: Encoder, weights: str) -> dict[str, Result]:
    """The results that are there already. Processes may see different files: what the first of them sees counts."""
    found: dict[str, dict[str, Any]] = {}
    error = ""
    if jax.process_index() == 0:
        try:
            epath.Path(out).mkdir(parents=True, exist_ok=True)
            for task in tasks:
                if not result_path(out, task.dataset.name).exists():
                    continue
                try:
                    opened = _Opened.of(task)
                except (ValueError, OSError):
                    continue  # said when its turn comes: without its data nobody knows whether a result still holds
                wanted = _made_by(encoder, weights, task.split, opened)
                if result := find_result(out, task.dataset.name, wanted):
                    found[task.dataset.name] = dataclasses.asdict(result)
        except (ValueError, OSError) as caught:
            error = str(caught)
    found, error = allgather_json([found, error])[0]
    if error:
        raise ValueError(error)
    return {name: Result(**each) for name, each in found.items()}


def _measure(encoder: Encoder, task: Task, model: str, weights: str, bar: tqdm.tqdm[Any]) -> tuple[Result, Predictions]:
    started = time.perf_counter()
    dataset, source, templates, _ = opened = _open_everywhere(task)
    bar.total = (bar.total or 0) + len(source) - task.dataset.samples
    bar.refresh()
    outcome = EVALUATORS[dataset.kind](encoder, source, templates, bar.update)
    surplus = len(source) - dataset.samples if dataset.samples else 0
    counts = {MISSING: max(-surplus, 0), SURPLUS: max(surplus, 0)}
    result = Result(
        dataset=dataset.name,
        model=model,
        pretrained=weights,
        task=dataset.task,
        metrics=outcome.metrics,
        dtype=encoder.dtype,
        versions=versions(),
        seconds=round(time.perf_counter() - started, 3),
        samples=outcome.samples,
        failed=outcome.failed | {why: count for why, count in counts.items() if count},
        made_by=_made_by(encoder, weights, task.split, opened),
    )
    return result, outcome.predictions


def _open_everywhere(task: Task) -> _Opened:
    """Opens the data; if one process cannot, or they see other data, none goes on."""
    opened, error = None, ""
    try:
        opened = _Opened.of(task)
    except (ValueError, OSError) as caught:
        error = str(caught)
    errors, contents = zip(*allgather_json([error, opened.content if opened else ""]), strict=True)
    if opened is None or any(errors):
        raise ValueError(next(each for each in errors if each))
    if other := next((i for i, each in enumerate(contents) if each != contents[0]), None):
        raise ValueError(f"process {other} sees other data than process 0 ({contents[other]}, not {contents[0]})")
    return opened


def versions() -> dict[str, str]:
    """Of the libraries that results depend on, and the kind and number of devices."""
    names = ("tclip-jax", "jax", "numpy", "Pillow")
    device = jax.devices()[0]
    where = {"python": platform.python_version(), "device": device.device_kind, "devices": str(jax.device_count())}
    return {name: metadata.version(name) for name in names} | where
