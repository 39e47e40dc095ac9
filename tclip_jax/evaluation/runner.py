"""Evaluate a model on many data sets. Existing results are reused, and one failure does not stop the others."""

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

EVALUATION = 1  # version: increment when a metric or the encoding of an image or a text changes
MISSING = "missing from the export"
SURPLUS = "more than the reference has"
AVERAGES = ("acc1", "acc1_or_mean_per_class_recall")

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of an evaluation, by data set and in the order of the tasks.

    Attributes:
      results: new and reused results. A result is partial if its `failed` is not empty.
      errors: one line per data set without a result.
    """

    results: dict[str, Result]
    errors: dict[str, str]

    @property
    def averages(self) -> dict[str, float]:
        """Return two means over the classification results: that of CLIP_benchmark, and that of OpenAI and DataComp.

        CLIP_benchmark averages acc1. OpenAI and DataComp average mean_per_class_recall for caltech101, fgvc_aircraft,
        flowers and pets, else acc1. The dict is empty without classification results.
        """
        scored = [each for each in self.results.values() if "acc1" in each.metrics]
        if not scored:
            return {}
        averaged = [DATASETS[each.dataset].averaged if each.dataset in DATASETS else "acc1" for each in scored]
        columns = (["acc1"] * len(scored), averaged)
        return {
            average: float(np.mean([each.metrics[metric] for each, metric in zip(scored, column, strict=True)]))
            for average, column in zip(AVERAGES, columns, strict=True)
        }

    def summary(self, model: str, weights: str, dtype: str) -> dict[str, Any]:
        """Return the content of summary.json. It follows CLIP_benchmark's schema and becomes a row of its table."""
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
        """The number of images that are not counted in each partial result, by reason."""
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
    """Evaluate every task without a result in `out`, and write its files and summary.json there.

    An existing result is reused if it was made with the same model, data content, class names, templates and metric
    definitions. This check opens the data.

    Args:
      encoder: the model.
      tasks: the data sets.
      model: name of the model in the results.
      weights: identity of the weights, such as `fingerprint` of the model.
      out: folder of the results; None to write no files.
      title: shown before the progress bar.

    Raises:
      ValueError: `out` has a result that is damaged or was made with different inputs.
    """
    results = {} if out is None else _existing_results(out, tasks, encoder, weights)
    pending = [task for task in tasks if task.dataset.name not in results]
    errors: dict[str, str] = {}
    shown = sys.stderr.isatty() and jax.process_index() == 0
    total = sum(task.dataset.samples for task in pending)
    with tqdm.tqdm(total=total, unit="image", dynamic_ncols=True, disable=not shown, leave=False) as bar:
        for task in pending:
            name = task.dataset.name
            bar.set_description(f"{title} {name}".strip())
            try:
                result, predictions = _measure(encoder, task, model, weights, bar)
            except (ValueError, OSError) as error:
                if isinstance(error, OSError) and jax.process_count() > 1:
                    raise  # the other processes wait in a collective: this process must fail, not continue
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
    """The opened data of a task, with the `digest` of its content."""

    dataset: Dataset
    source: Source
    templates: tuple[str, ...]
    content: str

    @classmethod
    def of(cls, task: Task) -> _Opened:
        dataset, source, templates = task.open()
        return cls(dataset, source, templates, digest(source))


def _made_by(encoder: Encoder, weights: str, split: str, opened: _Opened) -> Recipe:
    """Return everything that determines the metrics of a model on a data set.

    Batch size and device are not included: they change embeddings only by rounding.
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


def _existing_results(out: epath.PathLike, tasks: Sequence[Task], encoder: Encoder, weights: str) -> dict[str, Result]:
    """Return the reusable results in `out`, as process 0 reads them: other processes may read other files."""
    existing: dict[str, dict[str, Any]] = {}
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
                    continue  # the evaluation reports this error; without its data the result cannot be checked
                wanted = _made_by(encoder, weights, task.split, opened)
                if result := find_result(out, task.dataset.name, wanted):
                    existing[task.dataset.name] = dataclasses.asdict(result)
        except (ValueError, OSError) as caught:
            error = str(caught)
    existing, error = allgather_json([existing, error])[0]
    if error:
        raise ValueError(error)
    return {name: Result(**each) for name, each in existing.items()}


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
        source=task.source,
    )
    return result, outcome.predictions


def _open_everywhere(task: Task) -> _Opened:
    """Open the data on all processes. Raise on all of them if one cannot open it, or if their data differs."""
    opened, error = None, ""
    try:
        opened = _Opened.of(task)
    except (ValueError, OSError) as caught:
        error = str(caught)
    errors, contents = zip(*allgather_json([error, opened.content if opened else ""]), strict=True)
    if opened is None or any(errors):
        raise ValueError(next(each for each in errors if each))
    if process := next((i for i, each in enumerate(contents) if each != contents[0]), None):
        raise ValueError(
            f"process {process} reads different data than process 0 ({contents[process]}, not {contents[0]})"
        )
    return opened


def versions() -> dict[str, str]:
    """Return the versions of the libraries that determine results, and the kind and number of devices."""
    names = ("tclip-jax", "jax", "numpy", "Pillow")
    device = jax.devices()[0]
    machine = {"python": platform.python_version(), "device": device.device_kind, "devices": str(jax.device_count())}
    return {name: metadata.version(name) for name in names} | machine
