"""What may change when a run is resumed: checked before anything is written, then logged and kept."""

from __future__ import annotations

import json
import logging
from typing import Any

import jax
import ml_collections
from etils import epath

from tclip_jax.runs.record import (
    CONFIG,
    Changes,
    Record,
    changes,
    in_words,
    read_history,
    record_at,
    software,
    write_record,
)
from tclip_jax.runs.steps import decided
from tclip_jax.training.config import base_config

_FIXED = ("model", "ternary", "quantizer", "seed", "init", "init_scales", "inherit")
# Keys that no weight depends on, but for the rounding of sums in another order.
_FREE = (
    *("mesh.", "checkpoint.", "eval.", "evals", "remat", "telemetry_every", "log_every", "max_skipped_steps"),
    *("stall_minutes", "stall_exit", "compile_cache", "profile_steps", "wandb_project", "software."),
    *("data.workers", "data.microbatches", "data.max_bad_share"),
)
_PLACES = ("teacher.source", "data.source", "data.teacher_cache")  # of what is known by its content

_logger = logging.getLogger(__name__)


class Resume:
    """A start of a run, compared with what is in its workdir; a collective. Nothing is written before `begin`.

    Args:
      step: of the checkpoint that it goes on from, 0 for none.
      data: {"source", "split", "samples", "content"} of what it trains on.
      teacher, init: {"source", "content", …} of the weights that it learns and starts from, or None.

    Raises:
      ValueError: a key has changed that may not, or one that decides the weights although all steps are done.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: epath.PathLike,
        step: int,
        *,
        data: dict[str, Any],
        teacher: dict[str, Any] | None,
        init: dict[str, Any] | None,
    ) -> None:
        self._workdir, self._step = epath.Path(workdir), step
        resolved = json.loads(config.to_json())
        self._record: Record = {
            "config": resolved, "data": data, "teacher": teacher, "init": init, "software": software()
        }  # fmt: skip
        self.changed: Changes = decided(lambda: self._compare(resolved))

    def begin(self) -> None:
        """Writes config.json and history.jsonl, on process 0, and logs what has changed."""
        if jax.process_index() == 0:
            for key, values in self.changed.items():
                _logger.info("%s from step %d", in_words({key: values}), self._step)
            write_record(self._workdir, self._record, self._step, self.changed)

    def _compare(self, resolved: dict[str, Any]) -> Changes:
        history, path = read_history(self._workdir), self._workdir / CONFIG
        if not history:
            return {}
        kept = record_at(history, self._step)
        was = _complete(kept["config"])
        if fixed := changes({key: was[key] for key in _FIXED}, {key: resolved[key] for key in _FIXED}):
            key, (old, new) = next(iter(fixed.items()))
            raise ValueError(f"{path}: this run has config.{key} = {old}, not {new}: choose another workdir")
        if not self._step:
            return {}
        if self._record["init"] is None:
            self._record["init"] = kept.get("init")
        parts = {name: kept.get(name) for name in ("data", "teacher", "software") if kept.get(name)}
        changed = changes(_named(was, parts), _named(resolved, self._record))
        steps = resolved["steps"]
        if self._step > steps:
            raise ValueError(f"{path}: this run has done {self._step} steps, more than config.steps = {steps}")
        deciding = {
            key: values
            for key, values in changed.items()
            if not key.startswith(_FREE) and not (key in _PLACES and all(values))
        }
        if self._step == steps and deciding:
            raise ValueError(
                f"{path}: this run has done all its {steps} steps with other values: {in_words(deciding)}; raise"
                " config.steps to go on with these, or choose another workdir"
            )
        return changed


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of the keys that are newer than the run."""
    base = json.loads(base_config().to_json())
    whole = ("model", "preprocess", "quantizer")
    return {
        key: {**default, **config.get(key, {})}
        if isinstance(default, dict) and key not in whole
        else config.get(key, default)
        for key, default in base.items()
    }


def _named(config: dict[str, Any], record: Record) -> dict[str, Any]:
    """One mapping of everything: `teacher.source` is the key of the configuration, `teacher.content` its weights."""
    data = {**config["data"], **{key: each for key, each in (record.get("data") or {}).items() if key != "source"}}
    teacher = {"source": config["teacher"], "content": (record.get("teacher") or {}).get("content")}
    return {**config, "data": data, "teacher": teacher, "software": record.get("software") or {}}
