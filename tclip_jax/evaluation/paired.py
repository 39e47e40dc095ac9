"""The predictions of a result image by image, and two of them on the same images."""

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
# A metric as its file says it, in PyTorch's float32 perhaps, against the same from the predictions.
_SAME = 1e-6


@dataclasses.dataclass(frozen=True)
class Predicted:
    """Predictions with one row per image in every array.

    Attributes:
      keys: names of the images (N,), each once.
      arrays: `labels` (N,) and `top` (N, k), or in its place `share` (N,), of the draws that were right; or `labels`
        and `scores`, both (N, C); or `text_rank` (N,) and `image_ranks` (N, most captions of any image), in which the
        largest int64 stands where there is no caption.
    """

    keys: npt.NDArray[np.str_]
    arrays: Predictions

    @classmethod
    def read(cls, out: epath.PathLike, dataset: str, made_by: Recipe | None = None) -> Predicted:
        """What lies beside a result, and was made by the same.

        Raises:
          FileNotFoundError: no such file.
          ValueError: what `read_predictions` raises, other arrays than it tells of, or a key that is there twice.
        """
        path, arrays = predictions_path(out, dataset), read_predictions(out, dataset, made_by)
        keys = np.asarray(arrays.get("keys", ()))
        try:
            _, counts = np.unique(keys, return_counts=True)
            if keys.ndim != 1 or keys.dtype.kind != "U" or (counts > 1).any():
                raise ValueError("keys are not one name for each image")
            return cls(keys, _by_image(arrays, len(keys)))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not the predictions of an evaluation: {error}") from None

    @property
    def right(self) -> npt.NDArray[np.bool_] | None:
        """Whether each image (N,) got its label, or one of its captions in its top five; else None."""
        if "top" in self.arrays:
            return self.arrays["top"][:, 0] == self.arrays["labels"]
        return self.arrays["text_rank"] < 5 if "text_rank" in self.arrays else None

    def has(self, metric: str) -> bool:
        """Whether the metric can be computed."""
        if "top" in self.arrays:
            return metric in ("acc1", "acc5", "mean_per_class_recall")
        if "share" in self.arrays:
            return metric in ("acc1", "mean_per_class_recall")
        return metric == "mean_average_precision" if "scores" in self.arrays else bool(_RECALL.fullmatch(metric))

    def value(self, metric: str) -> float:
        """The metric over all images, a fraction 0–1."""
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
        """How many captions each image has (N,); one where there are none to count."""
        ranks = self.arrays.get("image_ranks")
        return np.ones(len(self.keys), np.int64) if ranks is None else np.count_nonzero(ranks != _NEVER, axis=1)

    def check(self, metrics: dict[str, float]) -> None:
        """Raises ValueError if a metric is not that of these predictions: they are of another run."""
        for metric, said in metrics.items():
            if self.has(metric) and not np.isnan(said) and abs(self.value(metric) - said) > _SAME:
                raise ValueError(f"{metric} is {said:.6f}, but {self.value(metric):.6f} by the predictions beside it")

    def rows(self, index: npt.NDArray[np.intp]) -> Predicted:
        """Some images, in this order."""
        return Predicted(self.keys[index], {name: array[index] for name, array in self.arrays.items()})

    def resampled(
        self, other: Predicted, metric: str, *, resamples: int, seed: int | Sequence[int]
    ) -> npt.NDArray[np.float64]:
        """Bootstrap of the difference (resamples,), the other's less this one's, on the same images."""
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
        """For how many of its answers (its label, its captions, or itself) each image counts (N,)."""
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
    """Both on the same images in the order of their keys, and how many of each were left out.

    Raises:
      ValueError: other images without `intersect` or of retrieval, none in common, or other labels.
    """
    common, mine, theirs = np.intersect1d(first.keys, second.keys, assume_unique=True, return_indices=True)
    only = (len(first.keys) - len(common), len(second.keys) - len(common))
    if any(only):
        apart = f"{only[0]:,} images only in A, {only[1]:,} only in B"
        if "text_rank" in first.arrays:
            raise ValueError(f"{apart}; ranks are among all images, so retrieval needs the same")
        if not len(common):
            raise ValueError(f"{apart}, none in both")
        if not intersect:
            raise ValueError(f"{apart}; --intersect compares the {len(common):,} of both")
    first, second = first.rows(mine), second.rows(theirs)
    truth = [side.arrays.get("labels", side.captions) for side in (first, second)]
    if set(first.arrays) != set(second.arrays) or truth[0].shape != truth[1].shape:
        raise ValueError("predictions of another kind, or of other classes, in A and B")
    differ = np.count_nonzero((truth[0] != truth[1]).reshape(len(common), -1).any(axis=1))
    if differ:
        raise ValueError(f"{differ:,} images have other labels in A than in B: other classes, or another order of them")
    return first, second, only


def _by_image(arrays: Predictions, count: int) -> Predictions:
    if "text_rank" in arrays:
        owners, ranks = arrays["text_to_image"], arrays["image_rank"]
        # The captions of each image in one row: the place of a caption among its image's, in order of the images.
        order = np.argsort(owners, kind="stable")
        captions = np.bincount(owners, minlength=count)
        place = np.arange(len(owners)) - np.repeat(np.cumsum(captions) - captions, captions)
        table = np.full((count, captions.max(initial=1)), _NEVER, np.int64)
        table[owners[order], place] = ranks[order]
        kept = {"text_rank": arrays["text_rank"], "image_ranks": table}
    else:
        kept = {name: arrays[name] for name in ("labels", next((n for n in ("scores", "share") if n in arrays), "top"))}
    wanted = {
        "text_rank": 1,
        "image_ranks": 2,
        "scores": 2,
        "top": 2,
        "share": 1,
        "labels": 2 if "scores" in kept else 1,
    }
    for name, array in kept.items():
        if array.ndim != wanted[name] or len(array) != count or array.dtype.kind not in "iufb":
            raise ValueError(f"{name} is {array.dtype} {array.shape}, for {count} keys")
    if "scores" in kept and kept["scores"].shape != kept["labels"].shape:
        raise ValueError(f"scores are {kept['scores'].shape}, labels {kept['labels'].shape}")
    return kept
