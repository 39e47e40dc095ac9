"""The suite of probes: linear and few-shot classifiers on the frozen embeddings of labelled data sets."""

from __future__ import annotations

import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import tqdm
from etils import epath

from tclip_jax.data.sources import Source, open_source
from tclip_jax.data.sources.webdataset import SHARD_COUNT
from tclip_jax.evaluation.encoder import Encoder
from tclip_jax.evaluation.features import Features, features
from tclip_jax.evaluation.metrics import classification_metrics
from tclip_jax.evaluation.probe import few_shot, linear_probe, t_interval
from tclip_jax.evaluation.results import PROBE_C, Predictions, Result, find_result, write_result
from tclip_jax.evaluation.runner import versions
from tclip_jax.evaluation.suite import find_datasets
from tclip_jax.evaluation.tasks import SPLIT, fetch
from tclip_jax.pages import aligned

LINEAR = "linear_probe"
NOT_USED = "unreadable or without a class"
_TRAIN = "train"
_MEANS = ("acc5", "mean_per_class_recall")

_logger = logging.getLogger(__name__)


class Pair(NamedTuple):
    """A data set, and how to open its split of a name."""

    name: str
    open: Callable[[str], Source]


def source_pair(spec: str) -> Pair:
    """The splits `train` and `test` of a source, written as `open_source` reads it."""
    return Pair(spec, functools.partial(open_source, spec))


def suite_pairs(root: epath.PathLike, suite: str, download: bool = False) -> list[Pair]:
    """Those of the webdataset exports of a suite, as `suite_tasks` finds them; `download` fetches both splits."""

    def open_split(folder: epath.Path, dataset: str, split: str) -> Source:
        if download and not (folder / split / SHARD_COUNT).exists():
            fetch(dataset, folder, split)
        return open_source(f"wds:{folder}", split)

    base = epath.Path(root).expanduser()
    rows = find_datasets(suite)
    return [Pair(row.name, functools.partial(open_split, base / row.folder, row.folder)) for row in rows]


def probe(
    encoder: Encoder,
    pairs: Sequence[Pair],
    *,
    model: str,
    weights: str,
    out: epath.PathLike,
    linear: bool = True,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: int = 5,
    cache: epath.PathLike | None = None,
) -> tuple[list[Result], dict[str, str]]:
    """Fits the probes of each data set that have no result in `out` yet; the results, and why others have none.

    A result is in `<out>/linear_probe` or `<out>/<k>_shot`, folders that `compare` compares. Metrics of few-shot are
    means over the seeds; `acc1_low` and `acc1_high` are the ends of Student's 95 % interval of that mean.

    Args:
      weights: as `fingerprint` of the model.
      seeds: draws of the training images for each number of shots.
      cache: folder of embeddings, as of `features`.

    Raises:
      ValueError: several processes, shots or seeds that are not positive, or results of other weights in `out`.
    """
    if jax.process_count() > 1:
        raise ValueError(f"probes are fitted on one process: there are {jax.process_count()}")
    if min(*shots, seeds, 1) < 1:
        raise ValueError(f"shots {list(shots)} and seeds {seeds} must be 1 or more")
    names = [*([LINEAR] if linear else []), *(f"{k}_shot" for k in shots)]
    results, errors = [], {}
    with tqdm.tqdm(unit="image", dynamic_ncols=True, disable=not sys.stderr.isatty(), leave=False) as bar:
        for pair in pairs:
            bar.set_description(pair.name)
            found = {name: find_result(epath.Path(out) / name, pair.name, weights, encoder.dtype) for name in names}
            results += [each for each in found.values() if each]
            left = [name for name in names if not found[name]]
            if not left:
                continue
            try:
                sources = [pair.open(split) for split in (_TRAIN, SPLIT)]
                train, test = (
                    features(encoder, source, weights=weights, cache=cache, progress=bar.update) for source in sources
                )
                lost = {
                    f"{split}: {NOT_USED}": len(source) - len(each.labels)
                    for split, source, each in zip((_TRAIN, SPLIT), sources, (train, test), strict=True)
                }
                failed = []
                for name in left:
                    bar.set_description(f"{pair.name} {name.replace('_', ' ')}")
                    started = time.perf_counter()
                    try:
                        metrics, predictions = _fitted(name, train, test, seeds)
                    except ValueError as error:
                        failed.append(f"{name}: {error}")
                        continue
                    result = Result(
                        dataset=pair.name,
                        model=model,
                        pretrained=weights,
                        task=name,
                        metrics=metrics,
                        dtype=encoder.dtype,
                        versions=versions(),
                        seconds=round(time.perf_counter() - started, 3),
                        samples=len(test.labels),
                        failed={why: count for why, count in lost.items() if count},
                    )
                    results.append(result)
                    (epath.Path(out) / name).mkdir(parents=True, exist_ok=True)
                    write_result(epath.Path(out) / name, result, predictions)
                if failed:
                    raise ValueError("; ".join(failed))
            except (ValueError, OSError) as error:
                errors[pair.name] = str(error)
                _logger.warning("%s: no result: %s", pair.name, error)
    return results, errors


def probe_table(results: Sequence[Result]) -> str:
    """A line for each data set and probe, in per cent."""
    rows = [["data set", "probe", "images", "acc1", "95 % over seeds", "acc5", "per class", PROBE_C]]
    for result in results:
        metrics = result.metrics
        low, high = (100 * metrics.get(name, math.nan) for name in ("acc1_low", "acc1_high"))
        cells = ["" if math.isnan(metrics[name]) else f"{100 * metrics[name]:.2f}" for name in ("acc1", *_MEANS)]
        spread = "" if math.isnan(low) else f"{low:.2f} … {high:.2f}"
        strength = f"{metrics[PROBE_C]:.3g}" if PROBE_C in metrics else ""
        probe_name = result.task.replace("_", " ")
        rows.append([result.dataset, probe_name, f"{result.samples:,}", cells[0], spread, *cells[1:], strength])
    return "\n".join(aligned(rows))


def _fitted(name: str, train: Features, test: Features, seeds: int) -> tuple[dict[str, float], Predictions]:
    predictions: Predictions = {"keys": test.keys, "index": test.places, "labels": test.labels}
    classes = len(np.unique(train.labels))
    if name == LINEAR:
        c, top = linear_probe(train.embeddings, train.labels, test.embeddings)
        return {**classification_metrics(top, test.labels, classes), PROBE_C: c}, predictions | {"top": top}
    shots = int(name.partition("_")[0])
    runs = [
        few_shot(train.embeddings, train.labels, test.embeddings, shots=shots, seed=seed).top for seed in range(seeds)
    ]
    each = [classification_metrics(top, test.labels, classes) for top in runs]
    metrics = {metric: float(np.mean([run[metric] for run in each])) for metric in each[0]}
    metrics["acc1_low"], metrics["acc1_high"] = t_interval([run["acc1"] for run in each])
    return metrics, predictions | {"share": np.mean([top[:, 0] == test.labels for top in runs], axis=0)}
