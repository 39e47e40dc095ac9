"""Checkpoints of trees of arrays and of the place in the data: when they are saved, which are kept, always whole."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal, Self

import jax
from etils import epath

from tclip_jax.parallel.sharding import path_of
from tclip_jax.runs.checksums import COMMITTED, CheckpointError, write_checksums
from tclip_jax.runs.steps import all_steps, decided, first_whole, saved_steps, set_aside
from tclip_jax.schema import MOST, key
from tclip_jax.storage import is_local


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


# Seconds that processes wait for each other while saving. Orbax counts them by the wall clock, which may be set; a
# process that is gone is noticed by JAX's own heartbeats.
_PATIENCE = 24 * 3600
_UNFINISHED = re.compile(r"\d+\.(orbax.*|deleted)")  # names of folders that are written or deleted

_logger = logging.getLogger(__name__)


class Checkpoints:
    """The folder `checkpoints/` of a run: a sub-folder per saved step, of its trees and of `data`.

    Each tree, such as `params`, can be read by itself. A checkpoint counts as one when all is written, with its
    checksums.

    A context manager: leaving it waits for writing in the background. Every process of a run calls the same methods.

    Args:
      whole: the steps that are whole, as `whole_steps` found them; all others are set aside.
    """

    def __init__(self, folder: epath.PathLike, config: CheckpointConfig, whole: Sequence[int] | None = None) -> None:
        self._folder, self._config = _absolute(folder), config
        self._scores: dict[int, float] = {}
        self._saving, self._position, self._saved_at = 0, dict[str, Any](), time.monotonic()
        self._unfinished: Exception | None = None
        self._steps: list[int] = decided(lambda: self._start(whole))  # those that are whole
        self._writer = _orbax().Writer(self._finish, _PATIENCE)
        self._deleting = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.wait()
        finally:
            self._deleting.shutdown()
            self._writer.close()

    def is_due(self, step: int, *, late: bool = False) -> bool:
        """Whether the state after `step` steps is to be saved; `late` is what `is_late` said a step ago."""
        return step % self._config.every == 0 or (late and step > self._saving + 1)

    def is_late(self) -> bool:
        """Whether it is to be saved by the time that has passed. Clocks differ: processes must agree on it."""
        return 0 < 60 * self._config.every_minutes <= time.monotonic() - self._saved_at

    def save(self, step: int, trees: Mapping[str, Any], position: Mapping[str, Any]) -> None:
        """Saves, in the background, the trees of arrays after `step` steps, by their names, and the data's position.

        Raises:
          CheckpointError: the checkpoint before this one could not be written.
        """
        self.wait()
        if step in self._steps:
            return
        self._saving, self._position, self._saved_at = step, dict(position), time.monotonic()
        with self._written():
            self._writer.save(self._folder / str(step), trees)

    def wait(self) -> None:
        """Until what is being saved is whole; raises CheckpointError if it cannot be."""
        with self._written():
            self._writer.wait()
        if self._saving and self._saving not in self._steps:
            self._steps.append(self._saving)
            if jax.process_index() == 0:
                self._deleting.submit(
                    self._delete, sorted({*self._steps} - kept(self._steps, self._scores, self._config))
                )
            self._steps = sorted(kept(self._steps, self._scores, self._config))

    def restore(self, abstract: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The newest trees, in the shapes and shardings of `abstract`; None if nothing was saved.

        Raises:
          CheckpointError: the checkpoint is broken, or not of this configuration.
        """
        if not self._steps:
            return None
        folder, restored = self._folder / str(self._steps[-1]), dict[str, Any]()
        with _explained(folder):
            for name, tree in abstract.items():
                shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
                restored[name] = _orbax().read_tree(folder / name, shapes)
        return restored

    def score(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Remembers the metric that decides which checkpoints are best, if it is among `metrics` of `step`."""
        value = metrics.get(self._config.best_metric)
        if value is not None and math.isfinite(value):
            self._scores[step] = value

    def _start(self, whole: Sequence[int] | None) -> list[int]:
        """On process 0: removes what a start before this one left unfinished; the steps that are whole."""
        if whole is not None:
            set_aside(self._folder, whole)
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                if _UNFINISHED.fullmatch(path.name):
                    path.rmtree()
        self._folder.mkdir(parents=True, exist_ok=True)
        return saved_steps(self._folder)

    def _finish(self, folder: epath.Path) -> None:
        """On process 0, when all is written by all processes."""
        try:
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder}: no such folder: it was removed while it was written")
            (folder / "data").mkdir(exist_ok=True)
            (folder / "data" / "metadata").write_text(json.dumps(self._position))
            write_checksums(folder)
        except Exception as error:  # raised here, whatever it is, the other processes would wait for this one
            self._unfinished = error

    def _delete(self, steps: Sequence[int]) -> None:
        """Removes steps so that one that is half removed does not look like one that is damaged."""
        for step in steps:
            folder = self._folder / str(step)
            try:
                if is_local(folder):
                    folder = folder.rename(self._folder / f"{step}.deleted")
                else:
                    (folder / COMMITTED).unlink()
                folder.rmtree()
            except OSError as error:
                _logger.warning("%s: an old checkpoint could not be removed: %s", folder, error)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Turns an error of writing into one CheckpointError, and gives back the space of what is not whole."""
        try:
            yield
            if self._unfinished:
                raise self._unfinished
        except Exception as error:
            # What the system said stands at the end of a long chain, and after it lines of C++.
            reason = " ".join(str(error).partition(" [source locations")[0].split())[-300:]
        else:
            return
        _collect_unheard()
        failed, self._saving, self._unfinished = self._saving, 0, None
        if jax.process_index() == 0:
            # What other threads are still writing is removed by the next start.
            with contextlib.suppress(OSError):
                for path in (*self._folder.glob(f"{failed}.orbax*"), self._folder / str(failed)):
                    path.rmtree(missing_ok=True)
        before = f"that of step {self._steps[-1]} is whole" if self._steps else "there is none before it"
        raise CheckpointError(f"{self._folder / str(failed)}: the checkpoint could not be written, {before}: {reason}")


def check_checkpoint(
    folder: epath.PathLike, step: int, abstract: Mapping[str, Any], seek: Callable[[Any], None], changed: str = ""
) -> None:
    """Whether a run can be resumed from a step, without reading its arrays or writing anything.

    Args:
      abstract: the trees that it needs.
      seek: is told the position in the data that was saved; raises ValueError if it cannot go there.
      changed: what has changed in the configuration, for the error.

    Raises:
      CheckpointError: it lacks a part, or is of other data.
    """
    saved = _absolute(folder) / str(step)
    with _explained(place := saved / "data" / "metadata"):
        seek(json.loads(place.read_text()))
    for name, tree in abstract.items():
        reason = f"it has no {name}"
        if (saved / name).exists():
            with _explained(saved / name):
                stored = _orbax().read_shapes(saved / name)
            try:
                _check_shapes(stored, tree, "this configuration's")
                continue
            except ValueError as error:
                reason = f"its {name}/{error}"
        since = f" since {changed}" if changed else ""
        raise CheckpointError(
            f"{saved}: cannot be resumed{since}: {reason}; change that back, or start a new run from its"
            " weights by config.init"
        )


def load_params(
    folder: epath.PathLike, abstract: Any, steps: Sequence[int] | None = None, *, average: bool = False
) -> tuple[int, Any]:
    """The newest whole step in `folder` and its parameters, as the tree of shapes `abstract` says.

    Nothing else is read. The log says which steps are passed over and why. A collective.

    Args:
      steps: the first of these that is whole, and no other.
      average: the average of the parameters.

    Raises:
      CheckpointError: there is no checkpoint, or it does not hold these parameters.
    """
    folder, item = _absolute(folder), "average" if average else "params"
    there = decided(lambda: all_steps(folder))
    if steps is not None and not {*steps} <= {*there}:
        named = ", ".join(map(str, there)) or "none is"
        raise CheckpointError(f"{folder}: no step {steps[0]} is saved there: {named}")
    step = first_whole(folder, there[::-1] if steps is None else steps, f"{item}/")
    newest = folder / str(step) / item
    if average and not newest.exists():
        raise CheckpointError(f"{newest.parent}: no average is there: config.optimizer.ema_decay keeps one")
    # One large array at a time, since each is there twice while it is read; the limit must exceed the largest.
    largest = max(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    with _explained(newest):
        _check_shapes(_orbax().read_shapes(newest), abstract)
        return step, _orbax().read_tree(newest, abstract, limit=largest + largest // 100 + 1)


def _orbax() -> Any:
    """The module that knows Orbax; both write the same files."""
    if (chosen := os.environ.get("TCLIP_ORBAX", "v0")) not in ("v0", "v1"):
        raise ValueError(f"TCLIP_ORBAX is {chosen!r}: it must be v0 or v1")
    from tclip_jax.runs import orbax_v0, orbax_v1

    return orbax_v1 if chosen == "v1" else orbax_v0


def _check_shapes(found: Mapping[str, tuple[int, ...]], abstract: Any, whose: str = "the model's") -> None:
    """Names what differs before anything is read: where Orbax fails, it leaves the reading of other arrays undone."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    expected = {path_of(path): tuple(leaf.shape) for path, leaf in leaves}
    for path in sorted(found.keys() | expected.keys()):
        if found.get(path) != expected.get(path):
            raise ValueError(f"{path} has shape {found.get(path)}, {whose} is {expected.get(path)}")


def _absolute(folder: epath.PathLike) -> epath.Path:
    """Orbax refuses relative paths, and only when it writes."""
    path = epath.Path(folder)
    return path.resolve() if is_local(path) else path


@contextlib.contextmanager
def _explained(folder: epath.Path) -> Iterator[None]:
    """Turns what Orbax raises into one CheckpointError."""
    reason: str | None = None
    try:
        yield
    except (ValueError, KeyError, OSError, TypeError) as error:
        reason = " ".join(str(error).split())[:400]
    if reason is None:
        return
    _collect_unheard()
    raise CheckpointError(f"{folder}: not a checkpoint of this configuration, or a broken one: {reason}")


def _collect_unheard() -> None:
    """Collects what a failure of Orbax left behind.

    It closes its event loop over the readers and writers of the other arrays. Each complains when it is collected, on
    stderr and long after: they are collected here, unheard.
    """
    hook, asyncio_log = sys.unraisablehook, logging.getLogger("asyncio")
    sys.unraisablehook, asyncio_log.disabled = (lambda _: None), True
    try:
        gc.collect()
    finally:
        sys.unraisablehook, asyncio_log.disabled = hook, False
