"""Trees of arrays on disk through Orbax's first API, at the top level of `orbax.checkpoint` before version 1.0."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from tclip_jax.parallel.sharding import path_of


class Writer:
    """Writes trees in the background, one folder at a time. Every process calls the same methods.

    Args:
      finish: called in the background on process 0, with the folder, after all processes have written their arrays and
        before the folder gets its final name. It must not raise: the other processes would wait for this one.
      timeout: seconds that processes wait for each other.
    """

    def __init__(self, finish: Callable[[epath.Path], None], timeout: int) -> None:
        self._finish, self._folder = finish, epath.Path()
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.AsyncOptions(timeout, post_finalization_callback=self._finished),
        )

    def save(self, folder: epath.Path, trees: Mapping[str, Any]) -> None:
        """Wait for the previous save, then start to write each tree into the sub-folder of its name."""
        self._checkpointer.wait_until_finished()
        self._folder = folder
        saved = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        self._checkpointer.save(folder, args=ocp.args.Composite(**saved))

    def check(self) -> None:
        """Raise the error of a save that has failed; do not wait."""
        self._checkpointer.check_for_errors()

    def wait(self) -> None:
        """Wait until the save has finished; raise its error."""
        self._checkpointer.wait_until_finished()

    def close(self) -> None:
        """Stop the background threads."""
        self._checkpointer.close()

    def _finished(self) -> None:
        # On a local disk the folder has a temporary name until it is complete.
        building: list[epath.Path] = []
        with contextlib.suppress(OSError):
            siblings = self._folder.parent.iterdir()
            building = [path for path in siblings if path.name.startswith(f"{self._folder.name}.orbax")]
        self._finish(building[0] if building else self._folder)


def read_tree(folder: epath.Path, abstract: Any, limit: int | None = None) -> Any:
    """Return the tree in `folder`, in the shapes and shardings of `abstract`.

    Args:
      folder: the sub-folder of one tree.
      abstract: a tree of jax.ShapeDtypeStruct.
      limit: bytes of arrays that are read at the same time; it must exceed the largest array.
    """
    bound = {} if limit is None else {"restore_concurrent_gb": limit / 1e9}
    # A Checkpointer would look for the metadata of a whole checkpoint in this sub-folder, and warn.
    return ocp.StandardCheckpointHandler(**bound).restore(folder, args=ocp.args.StandardRestore(abstract))


def read_shapes(folder: epath.Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array in `folder`, by its path, from the metadata."""
    stored = ocp.StandardCheckpointHandler().metadata(folder)
    if stored is None:
        raise ValueError("the metadata of its arrays cannot be read")
    return {path_of(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(stored.tree)}
