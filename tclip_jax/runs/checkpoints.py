"""Checkpoints of the state and of the place in the data, by Orbax: whole or not there at all."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from etils import epath

from tclip_jax.parallel.gather import gather_json
from tclip_jax.parallel.rules import path_of
from tclip_jax.runs.checksums import damage, write_checksums
from tclip_jax.runs.policy import CheckpointConfig, kept
from tclip_jax.storage import is_local

# Seconds that processes wait for each other while saving. Orbax counts them by the wall clock, which may be set; a
# process that is gone is noticed by JAX's own heartbeats.
_PATIENCE = 24 * 3600

_logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken or of another model; one line with the folder and what was expected."""


class Checkpoints:
    """The folder `checkpoints/` of a run: a sub-folder per saved step, of its trees and of `data`.

    Each tree, such as `params`, can be read by itself. A checkpoint counts as one when all is written, with its
    checksums.

    A context manager: leaving it waits for writing in the background. Every process of a run calls the same methods.
    """

    def __init__(self, folder: epath.PathLike, config: CheckpointConfig) -> None:
        self._folder, self._config = _absolute(folder), config
        self._scores: dict[int, float] = {}
        self._saving, self._saved_at = 0, time.monotonic()
        self._unfinished: Exception | None = None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(_PATIENCE, post_finalization_callback=self._finish),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._written():
            self._manager.close()

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
        saved = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items = ocp.args.Composite(**saved, data=ocp.args.JsonSave(dict(position)))
        if self._manager.latest_step() == step:
            return
        self.wait()
        self._saving, self._saved_at = step, time.monotonic()
        with self._written():
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Until what is being saved is whole; raises CheckpointError if it cannot be."""
        with self._written():
            self._manager.wait_until_finished()

    def restore(self, abstract: Mapping[str, Any], seek: Callable[[Any], None]) -> Mapping[str, Any] | None:
        """The newest trees, in the shapes and shardings of `abstract`; `seek` is told the position saved with them.

        None if nothing was saved.

        Raises:
          CheckpointError: the checkpoint is broken, or not of this configuration or its data.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(abstract))
        items = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()})
        with _explained(self._folder / str(step)):
            restored = self._manager.restore(step, args=items)
        with _explained(place := self._folder / str(step) / "data" / "metadata"):
            seek(json.loads(place.read_text()))
        return {name: restored[name] for name in abstract}

    def score(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Remembers the metric that decides which checkpoints are best, if it is among `metrics` of `step`."""
        value = metrics.get(self._config.best_metric)
        if value is not None and math.isfinite(value):
            self._scores[step] = value

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question which checkpoints to keep."""
        steps = [each.step for each in checkpoints]
        preserved = kept(steps, self._scores, self._config)
        return [step in preserved for step in steps]

    def _finish(self) -> None:
        """On process 0, when all is written by all processes and before it counts as a checkpoint."""
        name = str(self._saving)
        try:
            names = [path.name for path in self._folder.iterdir()]
            building = [each for each in names if each == name or each.startswith(f"{name}.orbax")]
            if not building:
                raise FileNotFoundError(
                    f"no such folder as {name} or {name}.orbax-…: it was removed while it was written"
                )
            write_checksums(self._folder / building[0])
        except Exception as error:  # raised here, whatever it is, the other processes would wait for this one
            self._unfinished = error

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
        folder = self._folder / str(self._saving)
        if jax.process_index() == 0:
            # What other threads are still writing is removed by the next start.
            with contextlib.suppress(OSError):
                for path in self._folder.glob(f"{self._saving}.orbax*"):
                    path.rmtree(missing_ok=True)
                if self._unfinished:
                    folder.rmtree(missing_ok=True)
        steps = [step for step in saved_steps(self._folder) if step < self._saving]
        before = f"that of step {max(steps)} is whole" if steps else "there is none before it"
        raise CheckpointError(f"{folder}: the checkpoint could not be written, {before}: {reason}")


def saved_steps(folder: epath.PathLike) -> list[int]:
    """The steps that a folder has finished checkpoints of, in order; none if there is no such folder."""
    folder = epath.Path(folder)
    # On an object store a folder has its name from the beginning, and a file that is written last.
    return sorted(
        int(path.name)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.name.isdigit() and (is_local(path) or (path / "commit_success.txt").exists())
    )


def whole_steps(folder: epath.PathLike) -> list[int]:
    """As `saved_steps`, the newest being one whose files are what was written.

    Those that are not are renamed to `<step>.damaged`, which the log says. A collective: process 0 does it.
    """
    folder = epath.Path(folder)
    if jax.process_index() == 0:
        steps = saved_steps(folder)
        while steps and (why := damage(folder / str(steps[-1]))):
            aside = folder / f"{steps.pop()}.damaged"
            if aside.exists():
                aside.rmtree()
            (folder / aside.stem).rename(aside)
            instead = f"going on from step {steps[-1]}" if steps else "there is none before it: starting anew"
            _logger.error("%s; renamed to %s; %s", why, aside.name, instead)
    return gather_json(saved_steps(folder) if jax.process_index() == 0 else None)[0]


def load_params(
    folder: epath.PathLike, abstract: Any, step: int | None = None, *, average: bool = False
) -> tuple[int, Any]:
    """The newest step in `folder` and its parameters, as the tree of shapes `abstract` says; nothing else is read.

    Parameters that are not what was written are passed over, which the log says.

    Args:
      step: that one and no other.
      average: the average of the parameters.

    Raises:
      CheckpointError: there is no checkpoint, or it does not hold these parameters.
    """
    folder, item = _absolute(folder), "average" if average else "params"
    steps, why = saved_steps(folder), None
    if step is not None:
        if step not in steps:
            raise CheckpointError(f"{folder}: no step {step} is saved there: {', '.join(map(str, steps)) or 'none is'}")
        steps = [step]
    while steps and (why := damage(folder / str(steps[-1]), f"{item}/")):
        steps.pop()
        _logger.error("%s%s", why, f": reading step {steps[-1]} instead" if steps else "")
    if not steps:
        raise CheckpointError(why or f"{folder}: no checkpoint there; expected a folder written by `tclip train`")
    newest = folder / str(steps[-1]) / item
    if average and not newest.exists():
        raise CheckpointError(f"{newest.parent}: no average is there: config.optimizer.ema_decay keeps one")
    # One large array at a time, since each is there twice while it is read; the limit must exceed the largest.
    largest = max(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    with _explained(newest), ocp.StandardCheckpointer(restore_concurrent_gb=1.01e-9 * largest) as checkpointer:
        _check_shapes(checkpointer.metadata(newest).item_metadata, abstract)
        return steps[-1], checkpointer.restore(newest, abstract)


def _check_shapes(stored: Any, abstract: Any) -> None:
    """Names what differs before anything is read: where Orbax fails, it leaves the reading of other arrays undone."""
    if stored is None:
        raise ValueError("its list of arrays cannot be read")
    found, expected = (
        {path_of(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (stored.tree, abstract)
    )
    for path in sorted(found.keys() | expected.keys()):
        if found.get(path) != expected.get(path):
            raise ValueError(f"{path} has shape {found.get(path)}, the model's is {expected.get(path)}")


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
