"""Linear classifiers on frozen embeddings: the linear probe of CLIP, and few-shot."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tclip_jax.evaluation.metrics import top_k
from tclip_jax.keys import Recipe, recipe

Embeddings = npt.NDArray[np.float32]
Labels = npt.NDArray[np.integer[Any]]

# CLIP's sweep: from 1e-6 to 1e6, eight to a decade.
STRENGTHS = 10.0 ** np.linspace(-6, 6, 97)
_COARSE = 16  # first two decades apart, then by halves
_HELD_OUT = 0.2
_CHOOSE_WITH = 4
_ITERATIONS = 1000


class Probe(NamedTuple):
    """A fitted probe.

    Attributes:
      c: inverse of the strength of regularisation that was chosen.
      top: the most probable classes of each test image (N, min(5, C)) int32.
    """

    c: float
    top: npt.NDArray[np.int32]


def protocol() -> Recipe:
    """What decides the fit of given embeddings, beside shots and seeds; `version` is raised with the code below."""
    return recipe(
        version=1,
        strengths=STRENGTHS.tolist(),
        coarse=_COARSE,
        held_out=_HELD_OUT,
        choose_with=_CHOOSE_WITH,
        iterations=_ITERATIONS,
    )


def linear_probe(train: Embeddings, labels: Labels, test: Embeddings, *, seed: int = 0) -> Probe:
    """Logistic regression on the whole training set, its C chosen on a fifth of it that was held out.

    L-BFGS with at most 1,000 iterations; C by `search` over `STRENGTHS`, then fitted again on everything. CLIP reads
    the features before its projection, here as in CLIP_benchmark they are the normalised embeddings, which are what
    zero-shot classification uses.

    Args:
      train: (N, D); labels: (N,).
      test: (M, D).
      seed: of what is held out.

    Raises:
      ValueError: fewer than two classes, or no class with the images to hold one out.

    Source: CLIP, arXiv 2103.00020, appendix A.3.
    """
    order = _by_class(labels, seed)
    held = np.concatenate([each[: round(_HELD_OUT * len(each))] for each in order])
    kept = np.concatenate([each[round(_HELD_OUT * len(each)) :] for each in order])
    c = _choose(train[kept], labels[kept], train[held], labels[held])
    return Probe(c, _classify(_fit(train, labels, c), test))


def few_shot(train: Embeddings, labels: Labels, test: Embeddings, *, shots: int, seed: int) -> Probe:
    """The same on `shots` images of every class, drawn by the seed; C is chosen on min(shots, 4) others of each.

    Raises:
      ValueError: a class with fewer images, or no image left to choose C with.

    Source: CLIP, arXiv 2103.00020, section 3.1.5; how many images choose C is from the code of CoOp, arXiv 2109.01134.
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
    """The index of 0 to count − 1 that scores best: every `step`-th, then the neighbours of the best by halves of it.

    Of equal scores the lowest index wins. Each is asked for at most once.

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
    """Student's interval of the mean of a few runs; NaN of fewer than two."""
    from scipy import stats

    runs = np.asarray(values, np.float64)
    if len(runs) < 2:
        return float("nan"), float("nan")
    # Not stats.ttest_1samp(...).confidence_interval(), nor stats.t.interval: equal runs give them a warning or NaN.
    half = stats.t.ppf((1 + level) / 2, len(runs) - 1) * stats.sem(runs)
    return float(runs.mean() - half), float(runs.mean() + half)


def _by_class(labels: Labels, seed: int) -> list[npt.NDArray[np.intp]]:
    """The rows of each class that occurs, in an order drawn by the seed."""
    classes = np.unique(labels)
    if len(classes) < 2:
        raise ValueError(f"the training images are of {len(classes)} class: a probe needs two")
    rng = np.random.default_rng(seed)
    return [rng.permutation(np.flatnonzero(labels == each)) for each in classes]


def _choose(train: Embeddings, labels: Labels, others: Embeddings, truth: Labels) -> float:
    if not len(truth):
        raise ValueError("no training image is left to choose the regularisation with")

    def accuracy(index: int) -> float:
        return float(np.mean(_classify(_fit(train, labels, STRENGTHS[index]), others)[:, 0] == truth))

    return float(STRENGTHS[search(accuracy, len(STRENGTHS), _COARSE)])


def _fit(embeddings: Embeddings, labels: Labels, c: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # Without regularisation 1,000 iterations are not enough; the limit is part of the protocol.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=_ITERATIONS).fit(embeddings, labels)


def _classify(classifier: Any, embeddings: Embeddings) -> npt.NDArray[np.int32]:
    """The most probable classes; those that were not trained on never are."""
    logits = classifier.decision_function(embeddings)
    logits = np.stack([-logits, logits], axis=1) if logits.ndim == 1 else logits  # one column of two classes
    return classifier.classes_[top_k(logits, 5)].astype(np.int32)
