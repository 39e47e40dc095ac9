"""Checkpoints of the training state and the data position: when to save, which to keep, how to restore."""

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

from tclip_jax.pages import without_details
from tclip_jax.parallel.sharding import path_of
from tclip_jax.runs.checksums import COMMITTED, CheckpointError, write_checksums
from tclip_jax.runs.steps import all_steps, decided, first_whole, saved_steps, set_aside
from tclip_jax.schema import MOST, key
from tclip_jax.storage import is_local


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save checkpoints, and which to keep. The last step, and the step of a preemption, are always saved."""

    every: int = key(1000, "steps between checkpoints", ge=1, le=MOST)
    every_minutes: float = key(0.0, "also save when the last checkpoint is so many minutes old; 0: by steps only", ge=0)
    keep: int = key(2, "newest checkpoints to keep", ge=1, le=MOST)
    keep_best: int = key(0, "best checkpoints to keep, by best_metric; saves every evaluated step", ge=0, le=MOST)
    best_metric: str = key("zero_shot_accuracy", "a name in metrics.jsonl")
    best_mode: Literal["max", "min"] = key("max", "whether the largest or the smallest best_metric is the best")


def kept(steps: Sequence[int], scores: Mapping[int, float], config: CheckpointConfig) -> set[int]:
    """Return the steps to keep: the `config.keep` newest and the `config.keep_best` best."""
    best = ranked(steps, scores, config)
    return {*sorted(steps)[-config.keep :], *best[max(0, len(best) - config.keep_best) :]}


def ranked(steps: Sequence[int], scores: Mapping[int, float], config: CheckpointConfig) -> list[int]:
    """Return the steps that have a score, the best last; of equal scores, the newer step is better."""
    sign = 1 if config.best_mode == "max" else -1
    return [step for _, step in sorted((sign * scores[step], step) for step in steps if step in scores)]


# Seconds that processes wait for each other while saving. The timeout is long, because Orbax measures it by the wall
# clock, which may jump; jax's heartbeats detect a lost process.
_TIMEOUT_SECONDS = 24 * 3600
_UNFINISHED = re.compile(r"\d+\.(orbax.*|deleted)")  # folders that were being written or deleted

_logger = logging.getLogger(__name__)


class Checkpoints:
    """The folder `checkpoints/` of a run, with a sub-folder per step for the trees of arrays and the data position.

    Each tree, such as `params`, can be read separately. A step counts as saved once all files and their checksums are
    written. A context manager: its exit waits for background writes. Every process of a run calls the same methods.

    Args:
      folder: `checkpoints/` of the run.
      config: when to save, and which steps to keep.
      whole: the result of `whole_steps`; all other steps are renamed or removed. None: no step is renamed.
    """

    def __init__(self, folder: epath.PathLike, config: CheckpointConfig, whole: Sequence[int] | None = None) -> None:
        self._folder, self._config = _absolute(folder), config
        self._scores: dict[int, float] = {}
        self._saving, self._position, self._saved_at = 0, dict[str, Any](), time.monotonic()
        self._unfinished: Exception | None = None
        self._steps: list[int] = decided(lambda: self._start(whole))  # the whole ones
        self._writer = _orbax().Writer(self._finish, _TIMEOUT_SECONDS)
        self._deleting = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.wait()
        except CheckpointError:
            if not isinstance(error, CheckpointError):  # Orbax raises again what was reported.
                raise
        finally:
            self._deleting.shutdown()
            self._writer.close()

    def is_due(self, step: int, *, late: bool = False) -> bool:
        """Whether to save the state after `step` steps; `late` is the result of `is_late` one step ago."""
        return step % self._config.every == 0 or (late and step > self._saving + 1)

    def is_late(self) -> bool:
        """Whether `config.every_minutes` have passed since the last save. Processes must agree, since clocks differ."""
        return 0 < 60 * self._config.every_minutes <= time.monotonic() - self._saved_at

    def save(self, step: int, trees: Mapping[str, Any], position: Mapping[str, Any]) -> None:
        """Start to save a step in the background, after the save before it has finished.

        Args:
          step: the number of steps done.
          trees: trees of arrays, by name.
          position: the data iterator's position, as JSON values.

        Raises:
          CheckpointError: the checkpoint before this one could not be written.
        """
        self.wait()
        if step in self._steps:
            return
        self._saving, self._position, self._saved_at = step, dict(position), time.monotonic()
        with self._written():
            self._writer.save(self._folder / str(step), trees)

    def check(self) -> None:
        """Raise CheckpointError if the background save has failed; do not wait for it."""
        with self._written():
            self._writer.check()

    def wait(self) -> None:
        """Wait until the background save has finished; raise CheckpointError if it failed."""
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
        """Return the trees of the newest step, in the shapes and shardings of `abstract`; None if there is no step.

        Raises:
          CheckpointError: the checkpoint is damaged, or of another configuration.
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
        """Store the value of `config.best_metric` at a step, if `metrics` has it and it is finite."""
        value = metrics.get(self._config.best_metric)
        if value is not None and math.isfinite(value):
            self._scores[step] = value

    def _start(self, whole: Sequence[int] | None) -> list[int]:
        """On process 0, remove the unfinished files of earlier starts; return the whole steps."""
        if whole is not None:
            set_aside(self._folder, whole)
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                if _UNFINISHED.fullmatch(path.name):
                    path.rmtree()
        self._folder.mkdir(parents=True, exist_ok=True)
        return saved_steps(self._folder)

    def _finish(self, folder: epath.Path) -> None:
        """Write the data position and the checksums, on process 0, after all processes have written their arrays."""
        try:
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder}: no such folder: it was removed while it was written")
            (folder / "data").mkdir(exist_ok=True)
            (folder / "data" / "metadata").write_text(json.dumps(self._position))
            write_checksums(folder)
        except Exception as error:  # an error raised here would leave the other processes waiting for this one
            self._unfinished = error

    def _delete(self, steps: Sequence[int]) -> None:
        """Remove steps. Each is first marked as deleted: a half-removed step must not look like a damaged one."""
        for step in steps:
            folder = self._folder / str(step)
            try:
                if is_local(folder):
                    folder = folder.rename(self._folder / f"{step}.deleted")
                else:
                    (folder / COMMITTED).unlink()
                folder.rmtree()
            except OSError as error:
                _logger.warning("%s: cannot remove this old checkpoint: %s", folder, error)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Turn any error of a save into one CheckpointError, and remove the incomplete checkpoint."""
        try:
            yield
            if self._unfinished:
                raise self._unfinished
        except Exception as error:
            # The system's message is the last in a long chain of messages, before TensorStore's details.
            reason = " ".join(without_details(str(error)).split())[-300:]
        else:
            return
        _collect_silently()
        failed, self._saving, self._unfinished = self._saving, 0, None
        if jax.process_index() == 0:
            # Other threads may still write files; the next start removes them.
            with contextlib.suppress(OSError):
                for path in (*self._folder.glob(f"{failed}.orbax*"), self._folder / str(failed)):
                    path.rmtree(missing_ok=True)
        whole = f"step {self._steps[-1]} is whole" if self._steps else "no earlier step is saved"
        raise CheckpointError(f"{self._folder / str(failed)}: the checkpoint could not be written; {whole}: {reason}")


def check_checkpoint(
    folder: epath.PathLike, step: int, abstract: Mapping[str, Any], seek: Callable[[Any], None], changed: str = ""
) -> None:
    """Check that a run can be resumed from a step, without reading arrays or writing files.

    Args:
      folder: `checkpoints/` of the run.
      step: the step to resume.
      abstract: the trees that the run needs, with their shapes.
      seek: moves the data iterator to the saved position; raises ValueError if the data differ.
      changed: the changes of the configuration, for the error.

    Raises:
      CheckpointError: a tree is missing or has another shape, or the data differ.
    """
    saved = _absolute(folder) / str(step)
    with _explained(position := saved / "data" / "metadata"):
        seek(json.loads(position.read_text()))
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
            f"{saved}: cannot be resumed{since}: {reason}; undo the change, or start a new run from its weights with"
            " config.init"
        )


def load_params(
    folder: epath.PathLike, abstract: Any, steps: Sequence[int] | None = None, *, average: bool = False
) -> tuple[int, Any]:
    """Return a whole step in `folder` and its parameters; log why other steps are skipped. A collective.

    Args:
      folder: `checkpoints/` of a run.
      abstract: the tree of shapes, dtypes and shardings of the parameters.
      steps: steps in the order of preference; None for all, the newest first.
      average: read the moving average of the parameters instead.

    Raises:
      CheckpointError: no step is whole, or it does not have these parameters.
    """
    folder, item = _absolute(folder), "average" if average else "params"
    saved = decided(lambda: all_steps(folder))
    if steps is not None and not {*steps} <= {*saved}:
        raise CheckpointError(f"{folder}: no step {steps[0]}; saved steps: {', '.join(map(str, saved)) or 'none'}")
    step = first_whole(folder, saved[::-1] if steps is None else steps, f"{item}/")
    newest = folder / str(step) / item
    if average and not newest.exists():
        raise CheckpointError(f"{newest.parent}: no average: config.optimizer.ema_decay > 0 stores one")
    # The limit, just above the largest array, saves memory: Orbax holds two copies of an array while it reads it.
    largest = max(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    with _explained(newest):
        _check_shapes(_orbax().read_shapes(newest), abstract)
        return step, _orbax().read_tree(newest, abstract, limit=largest + largest // 100 + 1)


def _orbax() -> Any:
    """Return the module of the Orbax API that TCLIP_ORBAX selects; both write the same format."""
    if (chosen := os.environ.get("TCLIP_ORBAX", "v0")) not in ("v0", "v1"):
        raise ValueError(f"TCLIP_ORBAX is {chosen!r}: it must be v0 or v1")
    from tclip_jax.runs import orbax_v0, orbax_v1

    return orbax_v1 if chosen == "v1" else orbax_v0


def _check_shapes(stored: Mapping[str, tuple[int, ...]], abstract: Any, whose: str = "the model's") -> None:
    """Raise ValueError for the first array whose shape differs; a failure in Orbax would leave reads unfinished."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    expected = {path_of(path): tuple(leaf.shape) for path, leaf in leaves}
    for path in sorted(stored.keys() | expected.keys()):
        if stored.get(path) != expected.get(path):
            raise ValueError(f"{path} has shape {stored.get(path)}, {whose} is {expected.get(path)}")


def _absolute(folder: epath.PathLike) -> epath.Path:
    """Return an absolute path; Orbax refuses relative ones, but only when it writes."""
    path = epath.Path(folder)
    return path.resolve() if is_local(path) else path


@contextlib.contextmanager
def _explained(folder: epath.Path) -> Iterator[None]:
    """Turn the errors of Orbax into one CheckpointError."""
    reason: str | None = None
    try:
        yield
    except (ValueError, KeyError, OSError, TypeError) as error:
        reason = " ".join(str(error).split())[:400]
    if reason is None:
        return
    _collect_silently()
    raise CheckpointError(f"{folder}: damaged, or not a checkpoint of this configuration: {reason}")


def _collect_silently() -> None:
    """Collect the unfinished coroutines that a failure of Orbax leaves, which would print to stderr later."""
    hook, asyncio_log = sys.unraisablehook, logging.getLogger("asyncio")
    sys.unraisablehook, asyncio_log.disabled = (lambda _: None), True
    try:
        gc.collect()
    finally:
        sys.unraisablehook, asyncio_log.disabled = hook, False
