"""Retrieval recall against brute force in float64 and against CLIP_benchmark."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest

from tclip_jax.evaluation import retrieval
from tclip_jax.evaluation.retrieval import Ranks, recall, retrieval_ranks, retrieval_recall

Floats = npt.NDArray[np.float32]


def pairs(images: int, captions: int, width: int = 16, seed: int = 0) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """Return unit embeddings of images and of captions near them, and the image of each caption in random order."""
    rng = np.random.default_rng(seed)
    owners = rng.integers(0, images, captions)
    image = rng.normal(size=(images, width))
    text = image[owners] + rng.normal(0, 1.2, (captions, width))
    return (*(np.float32(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in (image, text)), owners)


def brute_force(image: Any, text: Any, owners: Any, ks: Any) -> dict[str, float]:
    scores = np.float64(text) @ np.float64(image).T
    by_text = np.argsort(-scores, axis=1, kind="stable")
    by_image = np.argsort(-scores.T, axis=1, kind="stable")
    shares = {}
    for k in ks:
        shares[f"image_retrieval_recall@{k}"] = np.mean([owners[t] in by_text[t, :k] for t in range(len(text))])
        shares[f"text_retrieval_recall@{k}"] = np.mean([i in owners[by_image[i, :k]] for i in range(len(image))])
    return shares


@pytest.mark.parametrize(("images", "captions"), [(100, 500), (300, 90), (1, 1), (2500, 2100)])
def test_recall_equals_brute_force(images: int, captions: int) -> None:
    image, text, owners = pairs(images, captions)
    ours = retrieval_recall(image, text, owners, (1, 5, 10, 10_000))
    assert ours == pytest.approx(brute_force(image, text, owners, (1, 5, 10, 10_000)), abs=1e-12)


@hypothesis.given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 10**6))
@hypothesis.settings(max_examples=25)
def test_the_lower_index_of_equal_scores_ranks_first(images: int, captions: int, seed: int) -> None:
    # Small integers are exact, so most scores are tied.
    rng = np.random.default_rng(seed)
    image, text = (rng.integers(-1, 2, (n, 2)).astype(np.float32) for n in (images, captions))
    owners = rng.integers(0, images, captions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_TILE", 4)
        ours = retrieval_recall(image, text, owners, range(1, 8))
    assert ours == pytest.approx(brute_force(image, text, owners, range(1, 8)), abs=1e-12)


def test_identical_captions_tie_bit_exactly() -> None:
    image, text, _ = pairs(5000, 3, width=512)
    text = np.repeat(text[:1], 5000, axis=0)
    ranks = retrieval_ranks(image, text, np.arange(5000))
    # All captions are equal: each image ranks its caption by index, and each caption ranks all images by score.
    np.testing.assert_array_equal(ranks.text, np.arange(5000))
    assert sorted(ranks.image) == list(range(5000))


@pytest.mark.torch
@pytest.mark.parametrize("ks", [[5], [1, 5, 10]])
def test_recall_equals_clip_benchmark(ks: list[int]) -> None:
    import torch
    from clip_benchmark.metrics import zeroshot_retrieval

    image, text, owners = pairs(200, 1000)
    # CLIP_benchmark expects batches of images with all their captions; the model looks embeddings up.
    order = np.argsort(owners, kind="stable")
    captions = [[str(t) for t in order[owners[order] == i]] for i in range(len(image))]

    class Lookup:
        def encode_image(self, indices: Any) -> Any:
            return torch.from_numpy(image)[indices]

        def encode_text(self, indices: Any) -> Any:
            return torch.from_numpy(text)[indices]

    batches = [(torch.arange(s, min(s + 64, 200)), captions[s : s + 64]) for s in range(0, 200, 64)]
    theirs = zeroshot_retrieval.evaluate(
        Lookup(), batches, lambda texts: torch.tensor([int(t) for t in texts]), "cpu", amp=False, recall_k_list=ks
    )
    ours = retrieval_recall(image, text, owners, ks)
    assert ours == pytest.approx(theirs, abs=1e-6) and len(ours) == 2 * len(ks)


def test_an_image_without_captions_is_never_a_hit() -> None:
    image = np.eye(4, dtype=np.float32)
    ranks = retrieval_ranks(image, image[:2], [0, 1])
    assert ranks.text.tolist() == [0, 0, 2**63 - 1, 2**63 - 1] and ranks.image.tolist() == [0, 0]
    assert recall(ranks, [1]) == {"image_retrieval_recall@1": 1.0, "text_retrieval_recall@1": 0.5}


def test_float16_embeddings_are_scored_in_float32() -> None:
    image, text, owners = pairs(50, 100)
    half = retrieval_ranks(image.astype(np.float16), text.astype(np.float16), owners)
    single = retrieval_ranks(*(x.astype(np.float16).astype(np.float32) for x in (image, text)), owners)
    assert isinstance(half, Ranks)
    np.testing.assert_array_equal(half.image, single.image)
    np.testing.assert_array_equal(half.text, single.text)


def test_scores_are_computed_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, plain = [], retrieval._scores
    monkeypatch.setattr(retrieval, "_scores", lambda a, b: shapes.append((a.shape[0], b.shape[0])) or plain(a, b))
    retrieval_ranks(*pairs(2100, 4200))
    assert set(shapes) == {(2048, 2048)} and len(shapes) == 3 * 2 + 3


EYE = np.eye(3, dtype=np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((EYE[:0], EYE, [0, 1, 2]), "^0 images and 3 captions: retrieval needs at least one of each$"),
        ((EYE, EYE[:0], []), "^3 images and 0 captions"),
        ((EYE, EYE[:, :2], [0, 1, 2]), r"^embeddings are \(3, 3\) and \(3, 2\): they must be \(N, D\) and \(M, D\)$"),
        ((EYE, EYE, [0, 1]), r"^text_to_image is int64 \(2,\): it must be integers \(3,\)$"),
        ((EYE, EYE, [0, 1, 3]), "^text_to_image is 0 to 3: it must be 0 to 2$"),
        ((EYE, EYE, [-1, 1, 2]), "^text_to_image is -1 to 2"),
        ((EYE, EYE, [0.0, 1.0, 2.0]), "^text_to_image is float64"),
        ((EYE, EYE * np.nan, [0, 1, 2]), "^the embedding of caption 0 or of its image is not finite$"),
        ((np.diag(np.float32([1, 1, np.inf])), EYE[:2], [0, 1]), "^image embeddings 0 to 2 are not all finite$"),
    ],
)
def test_invalid_arguments_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_recall(*arguments)
