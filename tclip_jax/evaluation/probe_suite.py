"""Fit linear and few-shot probes on the embeddings of many data sets."""

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
    """The training and test images of a data set.

    Attributes:
      name: name of the data set.
      open: opens its split `train` or `test`.
      source: specification for `open_source`; "" for an export of a suite.
    """

    name: str
    open: Callable[[str], Source]
    source: str = ""


def source_pair(name: str, spec: str) -> Pair:
    """Return the splits of a source; `spec` is a specification for `open_source`."""
    return Pair(name, functools.partial(open_source, spec), spec)


def suite_pairs(root: epath.PathLike, suite: str, download: bool = False) -> list[Pair]:
    """Return the splits of the webdataset exports of a suite; see `suite_tasks`. `download` fetches both splits."""

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
    """Fit the probes without a result in `out`, and write their results to `<out>/linear_probe` and `<out>/<k>_shot`.

    An existing result is reused if it was made with the same model, content of both splits, class names, seeds and
    protocol. The classes of both splits are matched by name. Few-shot metrics are means over the seeds; `acc1_low` and
    `acc1_high` are the ends of Student's 95 % interval of the mean.

    Args:
      encoder: the model.
      pairs: the data sets.
      model: name of the model in the results.
      weights: identity of the weights, such as `fingerprint` of the model.
      out: folder of the results.
      linear: fit the linear probe.
      shots: numbers of training images per class of the few-shot probes.
      seeds: number of draws of the training images of each few-shot probe.
      cache: folder of the cached embeddings; see `labelled_embeddings`.

    Returns:
      All results, new and reused, and one error line by data set for those without a result.

    Raises:
      ValueError: there are several processes, shots or seeds are not positive, there is no probe to fit, or a result in
        `out` was made with different inputs.
    """
    if jax.process_count() > 1:
        raise ValueError(f"probes run on one process, but there are {jax.process_count()}")
    if min(*shots, seeds, 1) < 1:
        raise ValueError(f"shots {list(shots)} and seeds {seeds} must be 1 or more")
    names = [*([LINEAR] if linear else []), *(f"{k}_shot" for k in dict.fromkeys(shots))]
    if not names:
        raise ValueError("nothing to fit: enable the linear probe, or give numbers of shots")
    results, errors = [], {}
    with tqdm.tqdm(unit="image", dynamic_ncols=True, disable=not sys.stderr.isatty(), leave=False) as bar:
        for pair in pairs:
            bar.set_description(pair.name)
            try:
                sources = [pair.open(split) for split in (_TRAIN, SPLIT)]
            except (ValueError, OSError) as error:
                errors[pair.name] = str(error)
                if len(pairs) > 1:
                    _logger.warning("%s: no result: %s", pair.name, error)
                continue
            made_by = {name: _made_by(encoder, weights, pair.name, sources, name, seeds) for name in names}
            existing = {name: find_result(epath.Path(out) / name, pair.name, made_by[name]) for name in names}
            results += [each for each in existing.values() if each]
            pending = [name for name in names if not existing[name]]
            if not pending:
                continue
            try:
                train, test = (
                    labelled_embeddings(encoder, source, weights=weights, cache=cache, progress=bar.update)
                    for source in sources
                )
                labels = _match_classes(test.labels, train.labels, sources[1].classnames, sources[0].classnames)
                test = test._replace(labels=labels)
                unused = {
                    f"{split}: {NOT_USED}": len(source) - len(each.labels)
                    for split, source, each in zip((_TRAIN, SPLIT), sources, (train, test), strict=True)
                }
                failed = []
                for name in pending:
                    bar.set_description(f"{pair.name} {name.replace('_', ' ')}")
                    started = time.perf_counter()
                    try:
                        metrics, predictions = _evaluate(name, train, test, seeds)
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
                        failed={why: count for why, count in unused.items() if count},
                        made_by=made_by[name],
                        source=pair.source,
                    )
                    results.append(result)
                    (epath.Path(out) / name).mkdir(parents=True, exist_ok=True)
                    write_result(epath.Path(out) / name, result, predictions)
                if failed:
                    raise ValueError("; ".join(failed))
            except (ValueError, OSError) as error:
                errors[pair.name] = str(error)
                if len(pairs) > 1:
                    _logger.warning("%s: no result: %s", pair.name, error)
    return results, errors


def probe_table(results: Sequence[Result]) -> str:
    """Return a line per data set and probe, in per cent."""
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


def _match_classes(
    labels: npt.NDArray[np.int32],
    train_labels: npt.NDArray[np.int32],
    classes: Sequence[str],
    train_classes: Sequence[str],
) -> npt.NDArray[np.int32]:
    """Convert test labels, indices into `classes`, to indices into `train_classes` by name.

    Raises:
      ValueError: a test image has a class without training images, or the class lists differ and a name is repeated.
    """
    indices = np.arange(len(classes), dtype=np.int32)
    if tuple(classes) != tuple(train_classes):
        if repeated := [name for names in (classes, train_classes) for name, n in Counter(names).items() if n > 1]:
            raise ValueError(f"train and test have different classes, and two classes are named {repeated[0]!r}")
        index = {name: i for i, name in enumerate(train_classes)}
        indices = np.array([index.get(name, -1) for name in classes], np.int32)
    converted = indices[labels]
    if untrained := dict.fromkeys(classes[label] for label in labels[~np.isin(converted, train_labels)]):
        names = ", ".join(map(repr, [*untrained][:5])) + (", …" if len(untrained) > 5 else "")
        raise ValueError(f"test has images of {len(untrained)} classes without training images: {names}")
    return converted


def _evaluate(
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
