"""Trees of arrays on disk through Orbax's v1 API; `TCLIP_ORBAX=v1` selects it.

In Orbax 0.12.8 this API is `orbax.checkpoint.experimental.v1`; version 1.0 will have it at top level. Its limits:

- It calls no function between the last write and the commit: the saving functions ignore
  `AsyncOptions.post_finalization_callback`. The checksums are therefore written after Orbax's commit. On a local disk
  the folder still has a temporary name then, as with the first API. On an object store, a process that is killed in
  between leaves a step without checksums, which does not count as whole.
- It has no `reached_preemption`; `training/preemption.py` handles the signals.
- Its policies of what to save and keep need `training.Checkpointer`, which wraps the first API's manager and accepts no
  callback. `Checkpoints` applies `CheckpointConfig` for both APIs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from tclip_jax.parallel.sharding import path_of
from tclip_jax.storage import is_local


class Writer:
    """As `orbax_v0.Writer`, but on an object store the folder has its final name before `finish` is called."""

    def __init__(self, finish: Callable[[epath.Path], None], timeout: int) -> None:
        self._finish, self._timeout = finish, timeout
        self._thread, self._pending = ThreadPoolExecutor(1), Future[None]()
        self._pending.set_result(None)

    def save(self, folder: epath.Path, trees: Mapping[str, Any]) -> None:
        """Wait for the previous save, then start to write each tree into the sub-folder of its name."""
        self.wait()
        # The next start removes folders with such names.
        building = folder.parent / f"{folder.name}.orbax-v1" if is_local(folder) else folder
        context = ocp.Context()
        context.async_options.timeout_secs = self._timeout
        with context:
            response = ocp.save_checkpointables_async(building, dict(trees))
        self._pending = self._thread.submit(self._complete, response, building, folder)

    def check(self) -> None:
        """Raise the error of a save that has failed; do not wait."""
        if self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the save has finished; raise its error."""
        pending, self._pending = self._pending, Future[None]()
        self._pending.set_result(None)
        pending.result()

    def close(self) -> None:
        """Stop the background thread."""
        self._thread.shutdown()

    def _complete(self, response: Any, building: epath.Path, folder: epath.Path) -> None:
        response.result()
        if jax.process_index() == 0:
            self._finish(building)
            if building != folder:
                building.rename(folder)


def read_tree(folder: epath.Path, abstract: Any, limit: int | None = None) -> Any:
    """Read a tree as `orbax_v0.read_tree` does, from checkpoints of both APIs."""
    context = ocp.Context()
    context.memory_options.read_concurrent_bytes = limit
    with context:
        return ocp.load(folder.parent, abstract, checkpointable_name=folder.name)


def read_shapes(folder: epath.Path) -> dict[str, tuple[int, ...]]:
    """As `orbax_v0.read_shapes`."""
    stored = ocp.metadata(folder.parent, folder.name).metadata
    return {path_of(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(stored)}
