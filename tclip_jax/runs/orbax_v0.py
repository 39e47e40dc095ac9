"""Trees of arrays on disk by Orbax, through the API that it has at top level below version 1.0."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from tclip_jax.parallel.sharding import path_of


class Writer:
    """Writes trees in the background, those of one folder at a time. Every process calls the same methods.

    Args:
      finish: called on process 0 in the background, with the folder, when all processes have written all and before it
        has its name; it must not raise, since the other processes would wait for this one.
      patience: seconds that processes wait for each other.
    """

    def __init__(self, finish: Callable[[epath.Path], None], patience: int) -> None:
        self._finish, self._folder = finish, epath.Path()
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.AsyncOptions(patience, post_finalization_callback=self._finished),
        )

    def save(self, folder: epath.Path, trees: Mapping[str, Any]) -> None:
        """Starts to write each tree into the sub-folder of its name; waits for what is being written."""
        self._checkpointer.wait_until_finished()
        self._folder = folder
        saved = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        self._checkpointer.save(folder, args=ocp.args.Composite(**saved))

    def wait(self) -> None:
        """Until all is written; raises what went wrong."""
        self._checkpointer.wait_until_finished()

    def close(self) -> None:
        self._checkpointer.close()

    def _finished(self) -> None:
        # Where renaming is atomic the folder has another name until it is whole.
        building: list[epath.Path] = []
        with contextlib.suppress(OSError):
            each_path = self._folder.parent.iterdir()
            building = [path for path in each_path if path.name.startswith(f"{self._folder.name}.orbax")]
        self._finish(building[0] if building else self._folder)


def read_tree(folder: epath.Path, abstract: Any, limit: int | None = None) -> Any:
    """The tree in `folder`, in the shapes and shardings of `abstract`.

    Args:
      limit: bytes of arrays that are read at the same time; it must exceed the largest.
    """
    bound = {} if limit is None else {"restore_concurrent_gb": limit / 1e9}
    # Not by a Checkpointer, which looks for what Orbax says of a whole checkpoint, and warns.
    return ocp.StandardCheckpointHandler(**bound).restore(folder, args=ocp.args.StandardRestore(abstract))


def read_shapes(folder: epath.Path) -> dict[str, tuple[int, ...]]:
    """The shape of each array in `folder`, by its path; nothing else is read."""
    stored = ocp.StandardCheckpointHandler().metadata(folder)
    if stored is None:
        raise ValueError("its list of arrays cannot be read")
    return {path_of(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(stored.tree)}
