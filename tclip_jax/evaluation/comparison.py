"""Compare two folders of results: differences with confidence intervals, and the images whose prediction changed."""

from __future__ import annotations

import dataclasses
import math
import re
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

_PROBE = re.compile(r"linear_probe|\d+_shot")


@dataclasses.dataclass(frozen=True)
class Delta:
    """A metric of both models, in [0, 1].

    Attributes:
      a, b: the value of either model on the compared images.
      low, high: 95 % interval of b − a over images; NaN without predictions.
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
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


@dataclasses.dataclass(frozen=True)
class Flips:
    """The images whose prediction changed between correct and wrong; see `Predicted.correct`.

    Attributes:
      lost: keys of the images that are correct in A and wrong in B.
      gained: keys of the images that are wrong in A and correct in B.
      p: p-value of McNemar's exact test of the two counts.
    """

    lost: tuple[str, ...]
    gained: tuple[str, ...]
    p: float


@dataclasses.dataclass(frozen=True)
class Row:
    """The comparison of one data set.

    Attributes:
      dataset: name of the data set.
      probe: "linear_probe" or "<k>_shot"; "" for a zero-shot result.
      metric: the metric that tables show.
      images: number of compared images; 0 if a side has no predictions.
      only_a, only_b: number of images left out because the other side does not have them.
      deltas: the differences by metric.
      flips: the changed images; None for few-shot and multi-label results, and without predictions.
      source: specification of the data of A for `open_source`; "" for an export of a suite.
      split, content: split and content digest of the data of A; "" if its result does not record them.
      checked: whether both results record what made them, so that data and templates are known to be equal.
    """

    dataset: str
    probe: str
    metric: str
    images: int
    only_a: int
    only_b: int
    deltas: Mapping[str, Delta]
    flips: Flips | None
    source: str = ""
    split: str = ""
    content: str = ""
    checked: bool = False

    @property
    def name(self) -> str:
        """The data set and the probe, as tables show them."""
        return _named(self.dataset, self.probe)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The comparison of two folders of results.

    Attributes:
      a, b: the folders.
      models: names of the evaluated models in A and in B.
      rows: the compared data sets, sorted by file name in A; those of probes by probe first.
      refused: the reasons why data sets were not compared, by name.
      mean: mean of the main metrics over all rows; its interval resamples the images of every data set.
      resamples, seed: arguments of the bootstrap.
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
    """Compare two folders of results. Differences are B − A.

    A data set is refused, without stopping the others, if only one folder has it; if images differ and `intersect` is
    False; if task, labels, class names or templates differ; or if a metric differs from that of its predictions.
    Results without predictions are compared without intervals.

    Args:
      a, b: folders written by `tclip evaluate --out` or `tclip evaluate probe --out`.
      intersect: compare the common images if the images differ.
      resamples: resamples of the bootstrap. With 2,000, the ends of a 95 % interval vary by about 5 % of its length.
      seed: seed of the bootstrap.

    Raises:
      FileNotFoundError: a folder does not exist.
      ValueError: a folder has no results or two results of one data set, or a file is not a result.
    """
    results_a, results_b = _results(a), _results(b)
    rows, samples, refused = [], [], {}
    names = tqdm.tqdm(dict.fromkeys([*results_a, *results_b]), "resampling", unit="set", disable=None, leave=False)
    for key in names:
        probe, dataset = key
        if key not in results_a or key not in results_b:
            refused[_named(dataset, probe)] = f"only in {a if key in results_a else b}"
            continue
        folder_a, folder_b = (epath.Path(folder) / probe for folder in (a, b))
        try:
            row, differences = _compare(folder_a, folder_b, results_a[key], results_b[key], intersect, resamples, seed)
        except ValueError as error:
            refused[_named(dataset, probe)] = str(error)
            continue
        row = dataclasses.replace(row, probe=probe)
        rows.append(row)
        samples.append(differences)
    models = (_models(results_a), _models(results_b))
    return Comparison(str(a), str(b), models, tuple(rows), refused, _mean(rows, samples), resamples, seed)


def _results(folder: epath.PathLike) -> dict[tuple[str, str], Result]:
    """Return the results of a folder by ("", data set); those of a folder of probes by (probe, data set)."""
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; it must be an output folder of `tclip evaluate --out`")
    if results := _read_results(folder):
        return {("", name): result for name, result in results.items()}
    probes = [path.name for path in folder.iterdir() if _PROBE.fullmatch(path.name) and path.is_dir()]
    probes.sort(key=lambda name: int(name.partition("_")[0]) if name[0].isdigit() else 0)
    found = {(probe, name): each for probe in probes for name, each in _read_results(folder / probe).items()}
    if not found:
        raise ValueError(f"{folder}: it has no results (<dataset>.json), and no probes (linear_probe/, <k>_shot/)")
    return found


def _read_results(folder: epath.Path) -> dict[str, Result]:
    results: dict[str, Result] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name != SUMMARY:
            result = read_result(path)
            if result.dataset in results:
                raise ValueError(f"{path}: a second result of {result.dataset}; a folder must hold those of one model")
            results[result.dataset] = result
    return results


def _named(dataset: str, probe: str) -> str:
    return f"{dataset}, {probe.replace('_', ' ')}" if probe else dataset


def _models(results: Mapping[tuple[str, str], Result]) -> str:
    return ", ".join(dict.fromkeys(f"{r.model} ({r.pretrained})" for r in results.values()))


def _mean(rows: list[Row], samples: list[npt.NDArray[np.float64]]) -> Delta:
    if not rows:
        return Delta(math.nan, math.nan)
    main = [row.deltas[row.metric] for row in rows]
    low, high = interval(np.mean(samples, axis=0)) if all(len(each) for each in samples) else (math.nan, math.nan)
    return Delta(float(np.mean([each.a for each in main])), float(np.mean([each.b for each in main])), low, high)


def _compare(
    a: epath.PathLike, b: epath.PathLike, result_a: Result, result_b: Result, intersect: bool, resamples: int, seed: int
) -> tuple[Row, npt.NDArray[np.float64]]:
    """Return the row of a data set, and the resampled differences of its main metric (empty without predictions)."""
    name = result_a.dataset
    if result_a.task != result_b.task:
        raise ValueError(f"the task is {result_a.task} in A and {result_b.task} in B")
    checked = bool(result_a.made_by and result_b.made_by)
    if checked and (differs := difference(*(_without_model(each, intersect) for each in (result_a, result_b)))):
        raise ValueError(f"A and B differ in more than the model: {differs}")
    data = result_a.made_by.get("data", {})
    about = (result_a.source, str(data.get("split", "")), str(data.get("content", "")), checked)
    common = [metric for metric in result_a.metrics if metric in result_b.metrics and metric != PROBE_C]
    main = main_metric(common)
    if not main:
        raise ValueError("A and B have no common metric")
    deltas = {metric: Delta(result_a.metrics[metric], result_b.metrics[metric]) for metric in common}
    paths = [predictions_path(folder, name) for folder in (a, b)]
    if not all(path.exists() for path in paths):
        return Row(name, "", main, 0, 0, 0, deltas, None, *about), np.empty(0)
    first, second = (Predicted.read(folder, name, result.made_by) for folder, result in ((a, result_a), (b, result_b)))
    for side, result in ((first, result_a), (second, result_b)):
        side.check(result.metrics)
    first, second, only = paired(first, second, intersect)
    samples = {
        metric: first.resampled(second, metric, resamples=resamples, seed=(seed, zlib.crc32(name.encode())))
        for metric in common
        if first.has(metric) and not math.isnan(result_a.metrics[metric])
    }
    if any(only):
        # The metrics in the files cover all images of either side, so only recomputed metrics can be compared.
        deltas = {}
        if main not in samples:
            raise ValueError(f"{main} cannot be computed on the common images")
    for metric, differences in samples.items():
        deltas[metric] = Delta(first.value(metric), second.value(metric), *interval(differences))
    flips = _flips(first, second)
    row = Row(name, "", main, len(first.keys), only[0], only[1], deltas, flips, *about)
    return row, samples.get(main, np.empty(0))


def _without_model(result: Result, intersect: bool) -> Recipe:
    """Return `made_by` of a result without the parts that may differ: the model, and the images if `intersect`."""
    data = {key: value for key, value in result.made_by.get("data", {}).items() if key != "content" or not intersect}
    return {**result.made_by, "model": {}, "data": data}


def _flips(first: Predicted, second: Predicted) -> Flips | None:
    if first.correct is None or second.correct is None:
        return None
    lost, gained = first.correct & ~second.correct, ~first.correct & second.correct
    return Flips(tuple(map(str, first.keys[lost])), tuple(map(str, first.keys[gained])), _mcnemar(lost, gained))


def _mcnemar(lost: npt.NDArray[np.bool_], gained: npt.NDArray[np.bool_]) -> float:
    """Return the exact two-sided p-value of the hypothesis that both changes are equally likely; 1 without changes.

    Source: Q. McNemar, Psychometrika 12, 1947; the exact form of the binomial test.
    """
    from scipy import stats

    changed = int(np.count_nonzero(lost | gained))
    return float(stats.binomtest(int(np.count_nonzero(lost)), changed).pvalue) if changed else 1.0
