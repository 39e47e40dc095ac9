"""Linear classifiers on frozen embeddings: CLIP's linear probe, and few-shot probes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tclip_jax.evaluation.metrics import Integers, top_k
from tclip_jax.inference.model import Embeddings
from tclip_jax.keys import Recipe, recipe

# The sweep of CLIP over C, the inverse regularisation strength: from 1e-6 to 1e6, eight values per decade.
STRENGTHS = 10.0 ** np.linspace(-6, 6, 97)
_COARSE = 16  # first step of the search: two decades
_HELD_OUT = 0.2  # fraction of the training images that select C in the linear probe
_CHOOSE_WITH = 4  # at most this many images per class select C in a few-shot probe
_ITERATIONS = 1000


class Probe(NamedTuple):
    """A fitted probe.

    Attributes:
      c: the selected inverse regularisation strength.
      top: the most probable classes of each test image, best first (N, min(5, C)) int32.
    """

    c: float
    top: npt.NDArray[np.int32]


def protocol() -> Recipe:
    """Return what determines a fit besides data, shots and seeds. Increment `version` when the code below changes."""
    return recipe(
        version=1,
        strengths=STRENGTHS.tolist(),
        coarse=_COARSE,
        held_out=_HELD_OUT,
        choose_with=_CHOOSE_WITH,
        iterations=_ITERATIONS,
    )


def linear_probe(train: Embeddings, labels: Integers, test: Embeddings, *, seed: int = 0) -> Probe:
    """Fit logistic regression on the training set and classify the test set.

    C is selected by `search` over `STRENGTHS` on a held-out fifth of the training set; the final fit uses all of it.
    The solver is L-BFGS with at most 1,000 iterations. The features are the normalised embeddings, as in zero-shot
    classification and in CLIP_benchmark; CLIP uses the features before the projection.

    Args:
      train: training embeddings (N, D).
      labels: training labels (N,).
      test: test embeddings (M, D).
      seed: seed of the held-out images.

    Raises:
      ValueError: there are fewer than two classes, or too few images to hold any out.

    Source: CLIP, arXiv 2103.00020, appendix A.3.
    """
    order = _by_class(labels, seed)
    held = np.concatenate([each[: round(_HELD_OUT * len(each))] for each in order])
    rest = np.concatenate([each[round(_HELD_OUT * len(each)) :] for each in order])
    c = _choose(train[rest], labels[rest], train[held], labels[held])
    return Probe(c, _classify(_fit(train, labels, c), test))


def few_shot(train: Embeddings, labels: Integers, test: Embeddings, *, shots: int, seed: int) -> Probe:
    """Fit a probe on `shots` images per class, drawn by `seed`; min(shots, 4) other images per class select C.

    Raises:
      ValueError: a class has fewer images than `shots`, or no image is left to select C.

    Source: CLIP, arXiv 2103.00020, section 3.1.5. The number of images that select C is that of CoOp, arXiv 2109.01134.
    """
    order = _by_class(labels, seed)
    for each in order:
        if len(each) < shots:
            raise ValueError(f"class {labels[each[0]]} has {len(each)} training images, fewer than {shots} shots")
    drawn = np.concatenate([each[:shots] for each in order])
    others = np.concatenate([each[shots : shots + min(shots, _CHOOSE_WITH)] for each in order])
    c = _choose(train[drawn], labels[drawn], train[others], labels[others])
    return Probe(c, _classify(_fit(train[drawn], labels[drawn], c), test))


def search(score: Callable[[int], float], count: int, step: int) -> int:
    """Return the index in [0, count) with the best score, by a coarse search that is refined around the best index.

    The search scores every `step`-th index, then halves the step and scores both neighbours of the best index, until
    the step is 1. Each index is scored at most once. Of equal scores, the lowest index wins.

    Source: CLIP, arXiv 2103.00020, appendix A.3 ("parametric binary search").
    """
    scores = {index: score(index) for index in range(0, count, step)}
    while True:
        best = max(sorted(scores), key=scores.__getitem__)
        step //= 2
        if not step:
            return best
        for index in (best - step, best + step):
            if 0 <= index < count and index not in scores:
                scores[index] = score(index)


def t_interval(values: npt.ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Return Student's confidence interval of the mean of a few runs; NaN for fewer than two runs."""
    from scipy import stats

    runs = np.asarray(values, np.float64)
    if len(runs) < 2:
        return float("nan"), float("nan")
    # For equal runs, stats.ttest_1samp(...).confidence_interval() warns and stats.t.interval returns NaN.
    half = stats.t.ppf((1 + level) / 2, len(runs) - 1) * stats.sem(runs)
    return float(runs.mean() - half), float(runs.mean() + half)


def _by_class(labels: Integers, seed: int) -> list[npt.NDArray[np.intp]]:
    """Return the rows of each class that occurs, shuffled by the seed."""
    classes = np.unique(labels)
    if len(classes) < 2:
        raise ValueError(f"the training images have {len(classes)} class: a probe needs at least 2")
    rng = np.random.default_rng(seed)
    return [rng.permutation(np.flatnonzero(labels == each)) for each in classes]


def _choose(train: Embeddings, labels: Integers, held_out: Embeddings, truth: Integers) -> float:
    if not len(truth):
        raise ValueError("no training image is left to select the regularisation strength")

    def accuracy(index: int) -> float:
        return float(np.mean(_classify(_fit(train, labels, STRENGTHS[index]), held_out)[:, 0] == truth))

    return float(STRENGTHS[search(accuracy, len(STRENGTHS), _COARSE)])


def _fit(embeddings: Embeddings, labels: Integers, c: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # With little regularisation, 1,000 iterations do not converge; the limit is part of the protocol.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=_ITERATIONS).fit(embeddings, labels)


def _classify(classifier: Any, embeddings: Embeddings) -> npt.NDArray[np.int32]:
    """Return the most probable of the trained classes (N, min(5, C))."""
    logits = classifier.decision_function(embeddings)
    logits = np.stack([-logits, logits], axis=1) if logits.ndim == 1 else logits  # two classes have one column
    return classifier.classes_[top_k(logits, 5)].astype(np.int32)
