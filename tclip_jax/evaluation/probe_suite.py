"""The suite of probes: linear and few-shot classifiers on the frozen embeddings of labelled data sets."""

from __future__ import annotations

import functools
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import numpy.typing as npt
import tqdm
from etils import epath

from tclip_jax.data.sources import Source, digest, open_source
from tclip_jax.data.sources.webdataset import SHARD_COUNT
from tclip_jax.evaluation.embeddings import LabelledEmbeddings, labelled_embeddings
from tclip_jax.evaluation.encoder import Encoder
from tclip_jax.evaluation.metrics import classification_metrics
from tclip_jax.evaluation.probe import few_shot, linear_probe, protocol, t_interval
from tclip_jax.evaluation.results import PROBE_C, Predictions, Result, find_result, write_result
from tclip_jax.evaluation.runner import EVALUATION, versions
from tclip_jax.evaluation.suite import find_datasets
from tclip_jax.evaluation.tasks import SPLIT, fetch
from tclip_jax.keys import Recipe, recipe
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

    A result is in `<out>/linear_probe` or `<out>/<k>_shot`, folders that `compare` compares. One that is there is taken
    if the same made it: the model, both splits by their content, class names, seeds and all else of the protocol.
    Metrics of few-shot are means over the seeds; `acc1_low` and `acc1_high` are the ends of Student's 95 % interval of
    that mean. The classes of both splits are matched by name.

    Args:
      weights: as `fingerprint` of the model.
      seeds: draws of the training images for each number of shots.
      cache: folder of embeddings, as of `labelled_embeddings`.

    Raises:
      ValueError: several processes, shots or seeds that are not positive, no probe to fit, or a result in `out` that
        something else made.
    """
    if jax.process_count() > 1:
        raise ValueError(f"probes are fitted on one process: there are {jax.process_count()}")
    if min(*shots, seeds, 1) < 1:
        raise ValueError(f"shots {list(shots)} and seeds {seeds} must be 1 or more")
    names = [*([LINEAR] if linear else []), *(f"{k}_shot" for k in dict.fromkeys(shots))]
    if not names:
        raise ValueError("nothing to fit: neither the linear probe nor a number of shots")
    results, errors = [], {}
    with tqdm.tqdm(unit="image", dynamic_ncols=True, disable=not sys.stderr.isatty(), leave=False) as bar:
        for pair in pairs:
            bar.set_description(pair.name)
            try:
                sources = [pair.open(split) for split in (_TRAIN, SPLIT)]
            except (ValueError, OSError) as error:
                errors[pair.name] = str(error)
                _logger.warning("%s: no result: %s", pair.name, error)
                continue
            made_by = {name: _made_by(encoder, weights, pair.name, sources, name, seeds) for name in names}
            found = {name: find_result(epath.Path(out) / name, pair.name, made_by[name]) for name in names}
            results += [each for each in found.values() if each]
            left = [name for name in names if not found[name]]
            if not left:
                continue
            try:
                train, test = (
                    labelled_embeddings(encoder, source, weights=weights, cache=cache, progress=bar.update)
                    for source in sources
                )
                labels = _by_name(test.labels, train.labels, sources[1].classnames, sources[0].classnames)
                test = test._replace(labels=labels)
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
                        made_by=made_by[name],
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


def _made_by(encoder: Encoder, weights: str, dataset: str, sources: Sequence[Source], name: str, seeds: int) -> Recipe:
    train, test = sources
    contents = {"train": digest(train), "content": digest(test), "classes": train.classnames}
    return recipe(
        evaluation=EVALUATION,
        model={"weights": weights, **encoder.made_by},
        data={"name": dataset, "split": SPLIT, **contents, "test_classes": test.classnames},
        task={"kind": name, "protocol": protocol(), "seeds": 0 if name == LINEAR else seeds},
    )


def _by_name(
    labels: npt.NDArray[np.int32], trained: npt.NDArray[np.int32], own: Sequence[str], classes: Sequence[str]
) -> npt.NDArray[np.int32]:
    """Labels among the class names `own` as labels among the training split's `classes`.

    Raises:
      ValueError: images of a class that was not trained on, or names that are there twice and differ between splits.
    """
    places = np.arange(len(own), dtype=np.int32)
    if tuple(own) != tuple(classes):
        if twice := [name for names in (own, classes) for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"train and test have other classes, of which two are named {twice[0]!r}")
        index = {name: place for place, name in enumerate(classes)}
        places = np.array([index.get(name, -1) for name in own], np.int32)
    found = places[labels]
    if untrained := dict.fromkeys(own[label] for label in labels[~np.isin(found, trained)]):
        names = ", ".join(map(repr, [*untrained][:5])) + (", …" if len(untrained) > 5 else "")
        raise ValueError(f"test has images of {len(untrained)} classes of which train has none: {names}")
    return found


def _fitted(
    name: str, train: LabelledEmbeddings, test: LabelledEmbeddings, seeds: int
) -> tuple[dict[str, float], Predictions]:
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
