"""When a run is saved, and which of its checkpoints are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from tclip_jax.schema import MOST, key


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state and the data's position are saved (always at the end and on a stop), and which are kept."""

    every: int = key(1000, "steps", ge=1, le=MOST)
    every_minutes: float = key(0.0, "and when that long has passed since the last was saved; 0: by steps alone", ge=0)
    keep: int = key(2, "the newest", ge=1, le=MOST)
    keep_best: int = key(0, "and the best ones by `best_metric`; every evaluated step is then saved", ge=0, le=MOST)
    best_metric: str = key("zero_shot_accuracy", "a name of metrics.jsonl")
    best_mode: Literal["max", "min"] = key("max", "which values of `best_metric` are the best")


def kept(steps: Sequence[int], scores: Mapping[int, float], config: CheckpointConfig) -> set[int]:
    """The newest steps and the best, as many of each as the configuration says."""
    best = ranked(steps, scores, config)
    return {*sorted(steps)[-config.keep :], *best[max(0, len(best) - config.keep_best) :]}


def ranked(steps: Sequence[int], scores: Mapping[int, float], config: CheckpointConfig) -> list[int]:
    """The steps that have a score, the best last; of equals the newer is better."""
    sign = 1 if config.best_mode == "max" else -1
    return [step for _, step in sorted((sign * scores[step], step) for step in steps if step in scores)]
