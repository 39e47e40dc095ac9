"""Checkpoints of the state and of the data iterator, by Orbax: whole or not there at all."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

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
        try:
            restored = self._manager.restore(step, args=items)
        except (ValueError, KeyError, OSError, TypeError) as error:
            raise CheckpointError(_explain(self._folder / str(step), error)) from error
        training = restored.training
        return TrainState(training["step"], {"clip": restored.params} | training["heads"], training["optimizer"])


def load_params(folder: epath.PathLike, abstract: Any) -> tuple[int, Any]:
    """The newest step in `folder` and its parameters, as the tree of shapes `abstract` says; nothing else is read.

    Raises:
      CheckpointError: there is no checkpoint, or it does not hold these parameters.
    """
    folder = _absolute(folder)
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    if not steps:
        raise CheckpointError(f"{folder}: no checkpoint there; expected a folder written by `tclip train`")
    newest = folder / str(max(steps)) / "params"
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return max(steps), checkpointer.restore(newest, abstract)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise CheckpointError(_explain(newest, error)) from error


def _absolute(folder: epath.PathLike) -> epath.Path:
    """Orbax refuses relative paths, and only when it writes."""
    path = epath.Path(folder)
    return path.resolve() if is_local(path) else path


def _without_model(state: TrainState) -> dict[str, Any]:
    heads = {name: tree for name, tree in state.params.items() if name != "clip"}
    return {"step": state.step, "heads": heads, "optimizer": state.optimizer}


def _explain(folder: epath.Path, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"{folder}: not a checkpoint of this configuration, or a broken one: {reason[:300]}"
