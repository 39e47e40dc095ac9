"""Trees of arrays on disk by Orbax's v1 API, which version 1.0 will have at top level; `TCLIP_ORBAX=v1` selects it.

Of Orbax 0.12.8, where it is `orbax.checkpoint.experimental.v1`, it lacks what follows:

- No call between "all processes have written" and the commit. `AsyncOptions.post_finalization_callback` is there, and
  the saving functions never call it. So the checksums are written after the commit: locally before the folder gets its
  name, as with the API before; on an object store a process that is killed in that moment leaves a step without
  checksums, which is not whole.
- No `reached_preemption`: a save policy alone knows of preemptions. Ours come from `training/preemption.py`.
- Policies of what to save and keep belong to `training.Checkpointer`, which is the manager of the API before inside and
  takes no callback of ours. What is kept is decided by `runs/policy.py`, for both APIs.
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
    """As `orbax_v0.Writer`; on an object store the folder has its name when `finish` is called."""

    def __init__(self, finish: Callable[[epath.Path], None], patience: int) -> None:
        self._finish, self._patience = finish, patience
        self._thread, self._pending = ThreadPoolExecutor(1), Future[None]()
        self._pending.set_result(None)

    def save(self, folder: epath.Path, trees: Mapping[str, Any]) -> None:
        """Starts to write each tree into the sub-folder of its name; waits for what is being written."""
        self.wait()
        # Named as what Orbax is writing: a start after this one removes it.
        building = folder.parent / f"{folder.name}.orbax-v1" if is_local(folder) else folder
        context = ocp.Context()
        context.async_options.timeout_secs = self._patience
        with context:
            response = ocp.save_checkpointables_async(building, dict(trees))
        self._pending = self._thread.submit(self._complete, response, building, folder)

    def wait(self) -> None:
        """Until all is written; raises what went wrong."""
        pending, self._pending = self._pending, Future[None]()
        self._pending.set_result(None)
        pending.result()

    def close(self) -> None:
        self._thread.shutdown()

    def _complete(self, response: Any, building: epath.Path, folder: epath.Path) -> None:
        response.result()
        if jax.process_index() == 0:
            self._finish(building)
            if building != folder:
                building.rename(folder)


def read_tree(folder: epath.Path, abstract: Any, limit: int | None = None) -> Any:
    """As `orbax_v0.read_tree`, whose checkpoints it reads too."""
    context = ocp.Context()
    context.memory_options.read_concurrent_bytes = limit
    with context:
        return ocp.load(folder.parent, abstract, checkpointable_name=folder.name)


def read_shapes(folder: epath.Path) -> dict[str, tuple[int, ...]]:
    """As `orbax_v0.read_shapes`."""
    stored = ocp.metadata(folder.parent, folder.name).metadata
    return {path_of(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(stored)}
