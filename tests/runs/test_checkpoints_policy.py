"""Which checkpoints are kept."""

from __future__ import annotations

from tclip_jax.runs.checkpoints import CheckpointConfig, kept


def test_the_newest_and_the_best_are_kept() -> None:
    scores = {1: 0.5, 2: 0.9, 3: 0.9, 4: 0.1, 6: 0.2}
    steps = [1, 2, 3, 4, 5, 6]
    assert kept(steps, {}, CheckpointConfig(keep=2, keep_best=3)) == {5, 6}
    assert kept(steps, scores, CheckpointConfig(keep=2)) == {5, 6}
    assert kept(steps, scores, CheckpointConfig(keep=1, keep_best=1)) == {3, 6}  # of equals the newer
    assert kept(steps, scores, CheckpointConfig(keep=1, keep_best=2, best_mode="min")) == {4, 6}
    assert kept(steps, {1: 0.5}, CheckpointConfig(keep=1, keep_best=5)) == {1, 6}
    assert kept([], scores, CheckpointConfig()) == set()
