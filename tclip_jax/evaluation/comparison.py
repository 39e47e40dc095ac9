"""Two folders of results, data set by data set: differences, their intervals, and which images changed."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import tqdm
from etils import epath

from tclip_jax.evaluation.paired import Predicted, paired
from tclip_jax.evaluation.results import PROBE_C, SUMMARY, Result, predictions_path, read_result
from tclip_jax.evaluation.statistics import interval
from tclip_jax.evaluation.suite import main_metric
from tclip_jax.keys import Recipe, difference


@dataclasses.dataclass(frozen=True)
class Delta:
    """A metric of both sides, fractions 0–1.

    Attributes:
      a, b: the value of either side, on the images that are compared.
      low, high: of the 95 % interval of b − a over images; NaN where there are no predictions.
    """

    a: float
    b: float
    low: float = math.nan
    high: float = math.nan

    @property
    def delta(self) -> float:
        """B − A."""
        return self.b - self.a

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


@dataclasses.dataclass(frozen=True)
class Flips:
    """Images by what became of them, by their keys, and McNemar's exact p of the two numbers.

    Right is: the most probable class is the label; in retrieval, any caption of the image is among its five nearest.
    """

    lost: tuple[str, ...]
    gained: tuple[str, ...]
    p: float


@dataclasses.dataclass(frozen=True)
class Row:
    """A data set that both folders have.

    Attributes:
      metric: the one for tables.
      images: how many are compared; 0 where either side has no predictions.
      only_a, only_b: how many were left out because the other side has none of their key.
      deltas: by metric.
      flips: None of several labels, and without predictions.
      split, content: of A's data, as `keys.recipe` of an evaluation has them; "" of a result that does not say.
      checked: whether both results say what made them, so that their data and templates are known to be the same.
    """

    dataset: str
    metric: str
    images: int
    only_a: int
    only_b: int
    deltas: Mapping[str, Delta]
    flips: Flips | None
    split: str = ""
    content: str = ""
    checked: bool = False


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All of it.

    Attributes:
      a, b: the folders.
      models: what was evaluated on either side, as its results name it.
      rows: in the order of A's names.
      refused: data sets that could not be compared, and why.
      mean: of the metrics for tables over all rows; the interval is over the images of every data set.
      resamples, seed: of the bootstrap.
    """

    a: str
    b: str
    models: tuple[str, str]
    rows: tuple[Row, ...]
    refused: Mapping[str, str]
    mean: Delta
    resamples: int
    seed: int


def compare_results(
    a: epath.PathLike, b: epath.PathLike, *, intersect: bool = False, resamples: int = 2000, seed: int = 0
) -> Comparison:
    """Compares two folders of results; B − A is what B gains.

    A data set is refused, and the others go on, if only one folder has it, if the sides have other images (unless
    `intersect`, which compares those of both), other labels, class names, templates or another task, or if a metric is
    not that of the predictions beside it. Without predictions on either side there are differences without intervals.

    Args:
      resamples: of the bootstrap; 2,000 give the ends of a 95 % interval to about a twentieth of its length.
      seed: of the bootstrap.

    Raises:
      FileNotFoundError: a folder that is not there.
      ValueError: a folder without results or with two of one data set, or a file that is none.
    """
    ours, theirs = _results(a), _results(b)
    rows, samples, refused = [], [], {}
    names = tqdm.tqdm(dict.fromkeys([*ours, *theirs]), "resampling", unit="set", disable=None, leave=False)
    for name in names:
        if name not in ours or name not in theirs:
            refused[name] = f"only in {a if name in ours else b}"
            continue
        try:
            row, differences = _compare(a, b, ours[name], theirs[name], intersect, resamples, seed)
        except ValueError as error:
            refused[name] = str(error)
            continue
        rows.append(row)
        samples.append(differences)
    models = (_models(ours), _models(theirs))
    return Comparison(str(a), str(b), models, tuple(rows), refused, _mean(rows, samples), resamples, seed)


def _results(folder: epath.PathLike) -> dict[str, Result]:
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected what `tclip evaluate --out` wrote")
    found: dict[str, Result] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name != SUMMARY:
            result = read_result(path)
            if result.dataset in found:
                raise ValueError(f"{path}: a second result of {result.dataset}: a folder is of one model")
            found[result.dataset] = result
    if not found:
        raise ValueError(f"{folder}: no results (<dataset>.json) in it")
    return found


def _models(results: Mapping[str, Result]) -> str:
    return ", ".join(dict.fromkeys(f"{r.model} ({r.pretrained})" for r in results.values()))


def _mean(rows: list[Row], samples: list[npt.NDArray[np.float64]]) -> Delta:
    if not rows:
        return Delta(math.nan, math.nan)
    main = [row.deltas[row.metric] for row in rows]
    low, high = interval(np.mean(samples, axis=0)) if all(len(each) for each in samples) else (math.nan, math.nan)
    return Delta(float(np.mean([each.a for each in main])), float(np.mean([each.b for each in main])), low, high)


def _compare(
    a: epath.PathLike, b: epath.PathLike, ours: Result, theirs: Result, intersect: bool, resamples: int, seed: int
) -> tuple[Row, npt.NDArray[np.float64]]:
    """The row, and the resampled differences of its metric for tables (none without predictions)."""
    name = ours.dataset
    if ours.task != theirs.task:
        raise ValueError(f"{ours.task} in A, {theirs.task} in B")
    checked = bool(ours.made_by and theirs.made_by)
    if checked and (differs := difference(*(_apart_from_the_model(each, intersect) for each in (ours, theirs)))):
        raise ValueError(f"A and B differ in more than the model: {differs}")
    data = ours.made_by.get("data", {})
    split, content = (str(data.get(key, "")) for key in ("split", "content"))
    common = [metric for metric in ours.metrics if metric in theirs.metrics and metric != PROBE_C]
    main = main_metric(common)
    if not main:
        raise ValueError("no metric that both sides have")
    deltas = {metric: Delta(ours.metrics[metric], theirs.metrics[metric]) for metric in common}
    paths = [predictions_path(folder, name) for folder in (a, b)]
    if not all(path.exists() for path in paths):
        return Row(name, main, 0, 0, 0, deltas, None, split, content, checked), np.empty(0)
    first, second = (Predicted.read(folder, name, result.made_by) for folder, result in ((a, ours), (b, theirs)))
    for side, result in ((first, ours), (second, theirs)):
        side.check(result.metrics)
    first, second, only = paired(first, second, intersect)
    found = {
        metric: first.resampled(second, metric, resamples=resamples, seed=(seed, zlib.crc32(name.encode())))
        for metric in common
        if first.has(metric) and not math.isnan(ours.metrics[metric])
    }
    if any(only):
        # What the predictions do not give is of all images of either side.
        deltas = {}
        if main not in found:
            raise ValueError(f"{main} cannot be computed on the images of both")
    for metric, samples in found.items():
        deltas[metric] = Delta(first.value(metric), second.value(metric), *interval(samples))
    flips = _flips(first, second)
    row = Row(name, main, len(first.keys), only[0], only[1], deltas, flips, split, content, checked)
    return row, found.get(main, np.empty(0))


def _apart_from_the_model(result: Result, intersect: bool) -> Recipe:
    """What made a result, without what may differ between two that are compared."""
    data = {key: value for key, value in result.made_by.get("data", {}).items() if key != "content" or not intersect}
    return {**result.made_by, "model": {}, "data": data}


def _flips(first: Predicted, second: Predicted) -> Flips | None:
    if first.right is None or second.right is None:
        return None
    lost, gained = first.right & ~second.right, ~first.right & second.right
    return Flips(tuple(map(str, first.keys[lost])), tuple(map(str, first.keys[gained])), _mcnemar(lost, gained))


def _mcnemar(lost: npt.NDArray[np.bool_], gained: npt.NDArray[np.bool_]) -> float:
    """Exact two-sided p if each change were as likely one way as the other; 1 without a change.

    Source: Q. McNemar, Psychometrika 12, 1947; the exact form of the binomial test.
    """
    from scipy import stats

    changed = int(np.count_nonzero(lost | gained))
    return float(stats.binomtest(int(np.count_nonzero(lost)), changed).pvalue) if changed else 1.0
