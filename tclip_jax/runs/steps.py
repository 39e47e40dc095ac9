"""The steps that a run has saved: which of them are whole, and which one is meant."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from tclip_jax.parallel.gather import gather_json
from tclip_jax.runs.checksums import COMMITTED, CheckpointError, damage
from tclip_jax.storage import is_local

_logger = logging.getLogger(__name__)


def all_steps(folder: epath.PathLike) -> list[int]:
    """The steps that `folder` has sub-folders of, in order, whole or not; none if there is no such folder."""
    folder = epath.Path(folder)
    names = [path.name for path in (folder.iterdir() if folder.is_dir() else ())]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and name == str(int(name)))


def saved_steps(folder: epath.PathLike) -> list[int]:
    """Those whose files are all there in their lengths; their contents are compared when they are read."""
    folder = epath.Path(folder)
    return [step for step in all_steps(folder) if not damage(folder / str(step), contents=False)]


def whole_steps(folder: epath.PathLike) -> list[int]:
    """As `saved_steps`, the newest being one whose files are what was written: what training goes on from.

    Those that are not whole are renamed to `<step>.damaged`, which the log says; what was never finished is removed. A
    collective: process 0 does it.

    Raises:
      CheckpointError: none is whole, and to start anew would be to lose a run.
    """
    return decided(lambda: _set_aside(epath.Path(folder)))


def first_whole(folder: epath.PathLike, steps: Sequence[int], part: str = "") -> int:
    """The first of `steps` whose files, those of the sub-folder `part`, are what was written.

    The log says which are passed over and why. A collective: process 0 decides.

    Raises:
      CheckpointError: none is.
    """
    folder = epath.Path(folder)

    def decide() -> int:
        said: list[str] = []
        for step in steps:
            if not (why := damage(folder / str(step), part)):
                for each in said:
                    _logger.error("%s: reading step %d instead", each, step)
                return step
            said.append(why)
        raise CheckpointError(
            "; ".join(said) or f"{folder}: no checkpoint there; expected a folder written by `tclip train`"
        )

    return decided(decide)


def decided(decide: Callable[[], Any]) -> Any:
    """What `decide` returns on process 0, or the error that it raises there, on every process. A collective.

    Files that one machine sees another may not see yet: what depends on them is decided by one.
    """
    outcome: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            outcome = {"value": decide()}
        except (ValueError, OSError) as error:
            outcome = {"error": str(error)}
    outcome = gather_json(outcome)[0]
    if "error" in outcome:
        raise CheckpointError(outcome["error"])
    return outcome["value"]


def _set_aside(folder: epath.Path) -> list[int]:
    broken: dict[int, str] = {}
    for step in all_steps(folder):
        if not is_local(folder) and not (folder / str(step) / COMMITTED).exists():
            _logger.warning("%s was not finished: it is removed", folder / str(step))
            (folder / str(step)).rmtree()
        elif why := damage(folder / str(step), contents=False):
            broken[step] = why
    steps = [step for step in all_steps(folder) if step not in broken]
    while steps and (why := damage(folder / str(steps[-1]))):
        broken[steps.pop()] = why
    if broken and not steps:
        why = "; ".join(broken[step] for step in sorted(broken, reverse=True))
        raise CheckpointError(f"{folder}: no step is whole: {why}; to start anew, remove that folder")
    for step, why in sorted(broken.items(), reverse=True):
        aside = folder / f"{step}.damaged"
        if aside.exists():
            aside.rmtree()
        (folder / str(step)).rename(aside)
        _logger.error("%s; renamed to %s; going on from step %d", why, aside.name, steps[-1])
    return steps
