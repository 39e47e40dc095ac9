"""The predictions of two models on the same images."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.evaluation.metrics import hit_rate, mean_average_precision
from tclip_jax.evaluation.results import Predictions, predictions_path, read_predictions
from tclip_jax.evaluation.statistics import bootstrap_differences, bootstrap_map_differences, mean_of, per_class_mean_of
from tclip_jax.keys import Recipe

_RECALL = re.compile(r"(image|text)_retrieval_recall@(\d{1,9})")
_NEVER = np.iinfo(np.int64).max
_TOLERANCE = 1e-6  # allowed difference of a stored metric (possibly from float32) and its recomputed value


@dataclasses.dataclass(frozen=True)
class Predicted:
    """The predictions of a model, as arrays with one row per image.

    Attributes:
      keys: unique image names (N,).
      arrays: one of these sets of arrays:
        `labels` (N,) and `top` (N, k): single-label;
        `labels` (N,) and `share` (N,), the fraction of draws with a correct prediction: few-shot;
        `labels` and `scores`, both (N, C): multi-label;
        `text_rank` (N,) and `image_ranks` (N, most captions of an image), padded with the largest int64: retrieval.
    """

    keys: npt.NDArray[np.str_]
    arrays: Predictions

    @classmethod
    def read(cls, out: epath.PathLike, dataset: str, made_by: Recipe | None = None) -> Predicted:
        """Read the predictions of a result; see `read_predictions`.

        Raises:
          FileNotFoundError: the file does not exist.
          ValueError: `read_predictions` fails, arrays are missing or invalid, or keys are not unique.
        """
        path, arrays = predictions_path(out, dataset), read_predictions(out, dataset, made_by)
        keys = np.asarray(arrays.get("keys", ()))
        try:
            _, counts = np.unique(keys, return_counts=True)
            if keys.ndim != 1 or keys.dtype.kind != "U" or (counts > 1).any():
                raise ValueError("keys must be unique strings, one per image")
            return cls(keys, _by_image(arrays, len(keys)))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not the predictions of an evaluation: {error}") from None

    @property
    def correct(self) -> npt.NDArray[np.bool_] | None:
        """Whether each image (N,) is correct: its top class is the label, or a caption of it is among the five nearest.

        None for few-shot and multi-label predictions.
        """
        if "top" in self.arrays:
            return self.arrays["top"][:, 0] == self.arrays["labels"]
        return self.arrays["text_rank"] < 5 if "text_rank" in self.arrays else None

    def has(self, metric: str) -> bool:
        """Whether the metric can be computed from these predictions."""
        if "top" in self.arrays:
            return metric in ("acc1", "acc5", "mean_per_class_recall")
        if "share" in self.arrays:
            return metric in ("acc1", "mean_per_class_recall")
        return metric == "mean_average_precision" if "scores" in self.arrays else bool(_RECALL.fullmatch(metric))

    def value(self, metric: str) -> float:
        """Return the metric over all images, in [0, 1]."""
        if metric == "mean_average_precision":
            return mean_average_precision(self.arrays["scores"], self.arrays["labels"])
        if metric == "mean_per_class_recall":
            rows = np.stack([self._hits(metric), self.arrays["labels"]], axis=1)
            return float(per_class_mean_of(0, 1)(np.ones((1, len(rows))), rows)[0])
        if metric == "acc5":
            return hit_rate(self.arrays["top"], self.arrays["labels"])
        hits = self._hits(metric)
        captions = self.captions
        return float(hits.sum() / captions.sum() if metric.startswith("image") else hits.mean())

    @property
    def captions(self) -> npt.NDArray[np.int64]:
        """Number of captions of each image (N,); 1 if the task is not retrieval."""
        ranks = self.arrays.get("image_ranks")
        return np.ones(len(self.keys), np.int64) if ranks is None else np.count_nonzero(ranks != _NEVER, axis=1)

    def check(self, metrics: dict[str, float]) -> None:
        """Raise ValueError if a metric of the result differs from that of these predictions."""
        for metric, value in metrics.items():
            if self.has(metric) and not np.isnan(value) and abs(self.value(metric) - value) > _TOLERANCE:
                raise ValueError(
                    f"{metric} is {value:.6f} in the result, but {self.value(metric):.6f} by its predictions"
                )

    def rows(self, index: npt.NDArray[np.intp]) -> Predicted:
        """Return the predictions of some images, in the given order."""
        return Predicted(self.keys[index], {name: array[index] for name, array in self.arrays.items()})

    def resampled(
        self, other: Predicted, metric: str, *, resamples: int, seed: int | Sequence[int]
    ) -> npt.NDArray[np.float64]:
        """Return the bootstrapped difference other − self of a metric (resamples,); both must have the same images."""
        if metric == "mean_average_precision":
            scores, targets = (self.arrays["scores"], other.arrays["scores"]), self.arrays["labels"]
            return bootstrap_map_differences(*scores, targets, resamples=resamples, seed=seed)
        weight = self.arrays["labels"] if metric == "mean_per_class_recall" else self.captions
        table = np.stack([self._hits(metric), other._hits(metric), weight], axis=1)
        if metric == "mean_per_class_recall":
            measures = per_class_mean_of(0, 2), per_class_mean_of(1, 2)
        else:
            count = 2 if metric.startswith("image") else None
            measures = mean_of(0, count), mean_of(1, count)
        return bootstrap_differences(table, *measures, resamples=resamples, seed=seed)

    def _hits(self, metric: str) -> npt.NDArray[Any]:
        """Return the hits of each image (N,): a count over its captions for image recall, else 0, 1 or a fraction."""
        recall = _RECALL.fullmatch(metric)
        if recall and recall[1] == "image":
            return np.count_nonzero(self.arrays["image_ranks"] < int(recall[2]), axis=1)
        if recall:
            return (self.arrays["text_rank"] < int(recall[2])).astype(np.int64)
        if "share" in self.arrays:
            return self.arrays["share"]
        candidates = self.arrays["top"] if metric == "acc5" else self.arrays["top"][:, :1]
        return np.count_nonzero(candidates == self.arrays["labels"][:, None], axis=1)


def paired(first: Predicted, second: Predicted, intersect: bool) -> tuple[Predicted, Predicted, tuple[int, int]]:
    """Return both predictions on their common images, sorted by key, and how many images of each were left out.

    Args:
      first, second: the predictions.
      intersect: allow different images.

    Raises:
      ValueError: the images differ and `intersect` is False or the task is retrieval, there is no common image, or the
        labels differ.
    """
    common, first_rows, second_rows = np.intersect1d(first.keys, second.keys, assume_unique=True, return_indices=True)
    only = (len(first.keys) - len(common), len(second.keys) - len(common))
    if any(only):
        counts = f"{only[0]:,} images only in A, {only[1]:,} only in B"
        if "text_rank" in first.arrays:
            raise ValueError(f"{counts}; retrieval ranks all images, so both sides need the same ones")
        if not len(common):
            raise ValueError(f"{counts}, no common image")
        if not intersect:
            raise ValueError(f"{counts}; --intersect compares the {len(common):,} common images")
    first, second = first.rows(first_rows), second.rows(second_rows)
    truth = [side.arrays.get("labels", side.captions) for side in (first, second)]
    if set(first.arrays) != set(second.arrays) or truth[0].shape != truth[1].shape:
        raise ValueError("A and B have different kinds of predictions or different numbers of classes")
    differ = np.count_nonzero((truth[0] != truth[1]).reshape(len(common), -1).any(axis=1))
    if differ:
        raise ValueError(
            f"{differ:,} images have different labels in A and B: their class lists or the order of the classes differ"
        )
    return first, second, only


def _by_image(arrays: Predictions, count: int) -> Predictions:
    if "text_rank" in arrays:
        owners, ranks = arrays["text_to_image"], arrays["image_rank"]
        # One row per image with the ranks of its captions; `column` numbers the captions of each image.
        order = np.argsort(owners, kind="stable")
        captions = np.bincount(owners, minlength=count)
        column = np.arange(len(owners)) - np.repeat(np.cumsum(captions) - captions, captions)
        table = np.full((count, captions.max(initial=1)), _NEVER, np.int64)
        table[owners[order], column] = ranks[order]
        by_image = {"text_rank": arrays["text_rank"], "image_ranks": table}
    else:
        by_image = {
            name: arrays[name] for name in ("labels", next((n for n in ("scores", "share") if n in arrays), "top"))
        }
    dimensions = {
        "text_rank": 1,
        "image_ranks": 2,
        "scores": 2,
        "top": 2,
        "share": 1,
        "labels": 2 if "scores" in by_image else 1,
    }
    for name, array in by_image.items():
        if array.ndim != dimensions[name] or len(array) != count or array.dtype.kind not in "iufb":
            raise ValueError(f"{name} is {array.dtype} {array.shape}, but there are {count} keys")
    if "scores" in by_image and by_image["scores"].shape != by_image["labels"].shape:
        raise ValueError(f"scores are {by_image['scores'].shape}, labels {by_image['labels'].shape}")
    return by_image
