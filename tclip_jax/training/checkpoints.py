"""Checkpoints of the state and of the data iterator, by Orbax: whole or not there at all."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

from tclip_jax.parallel.rules import path_of
from tclip_jax.storage import is_local
from tclip_jax.training.config import CheckpointConfig
from tclip_jax.training.state import TrainState


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken or of another model; one line with the folder and what was expected."""


class Checkpoints:
    """The folder `checkpoints/` of a run: a sub-folder per saved step, of `params`, `training` and `data`.

    `params` is the model's tree alone, so that it can be read without knowing how it was trained.

    A context manager: leaving it waits for writing in the background.
    """

    def __init__(self, folder: epath.PathLike, config: CheckpointConfig) -> None:
        self._folder = _absolute(folder)
        self._every = config.every
        options = ocp.CheckpointManagerOptions(max_to_keep=config.keep)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._manager.close()

    def save(self, step: int, state: TrainState, iterator: grain.DatasetIterator, *, force: bool = False) -> bool:
        """Saves after `step` steps if that step is due, or if forced; in the background. Whether it did."""
        if self._manager.latest_step() == step or not (force or step % self._every == 0):
            return False
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params["clip"]),
            training=ocp.args.StandardSave(_without_model(state)),
            data=grain.checkpoint.CheckpointSave(iterator),
        )
        return self._manager.save(step, args=items, force=True)

    def restore(self, state: TrainState, iterator: grain.DatasetIterator) -> TrainState | None:
        """The newest state, in the shardings of `state`, with `iterator` set to follow it; None if nothing was saved.

        Raises:
          CheckpointError: the checkpoint is broken or not of this configuration.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params["clip"]),
            training=ocp.args.StandardRestore(_without_model(abstract)),
            data=grain.checkpoint.CheckpointRestore(iterator),
        )
        with _explained(self._folder / str(step)):
            restored = self._manager.restore(step, args=items)
        training = restored.training
        params = {"clip": restored.params} | training["heads"]
        return TrainState(training["step"], params, training["optimizer"], training.get("average"))


def saved_steps(folder: epath.PathLike) -> list[int]:
    """The steps that a folder has whole checkpoints of; none if there is no such folder."""
    folder = epath.Path(folder)
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []


def load_params(folder: epath.PathLike, abstract: Any) -> tuple[int, Any]:
    """The newest step in `folder` and its parameters, as the tree of shapes `abstract` says; nothing else is read.

    Raises:
      CheckpointError: there is no checkpoint, or it does not hold these parameters.
    """
    folder = _absolute(folder)
    steps = saved_steps(folder)
    if not steps:
        raise CheckpointError(f"{folder}: no checkpoint there; expected a folder written by `tclip train`")
    newest = folder / str(max(steps)) / "params"
    # One large array at a time, since each is there twice while it is read; the limit must exceed the largest.
    largest = max(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    with _explained(newest), ocp.StandardCheckpointer(restore_concurrent_gb=1.01e-9 * largest) as checkpointer:
        _check_shapes(checkpointer.metadata(newest).item_metadata, abstract)
        return max(steps), checkpointer.restore(newest, abstract)


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


def _without_model(state: TrainState) -> dict[str, Any]:
    heads = {name: tree for name, tree in state.params.items() if name != "clip"}
    average = {} if state.average is None else {"average": state.average}
    return {"step": state.step, "heads": heads, "optimizer": state.optimizer} | average


@contextlib.contextmanager
def _explained(folder: epath.Path) -> Iterator[None]:
    """Turns what Orbax raises into one CheckpointError.

    Orbax closes its event loop over the readers of the other arrays. Each complains when it is collected, on stderr and
    long after: they are collected here, unheard.
    """
    reason: str | None = None
    try:
        yield
    except (ValueError, KeyError, OSError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
    if reason is None:
        return
    hook, asyncio_log = sys.unraisablehook, logging.getLogger("asyncio")
    sys.unraisablehook, asyncio_log.disabled = (lambda _: None), True
    try:
        gc.collect()
    finally:
        sys.unraisablehook, asyncio_log.disabled = hook, False
    raise CheckpointError(f"{folder}: not a checkpoint of this configuration, or a broken one: {reason}")
