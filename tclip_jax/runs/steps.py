"""The steps that a run has saved: which of them are whole, and which one is meant."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from tclip_jax.parallel.agreement import allgather_json
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
    """As `saved_steps`, the newest being one whose files are what was written: what training resumes from.

    Changes nothing; `set_aside` removes the others. A collective: process 0 decides.

    Raises:
      CheckpointError: none is whole, and to start anew would be to lose a run.
    """
    return decided(lambda: _whole_steps(epath.Path(folder)))


def set_aside(folder: epath.PathLike, whole: Sequence[int]) -> None:
    """Renames the steps that are not `whole` to `<step>.damaged`, as the log says; removes what was never finished."""
    folder = epath.Path(folder)
    for step in sorted({*all_steps(folder)} - {*whole}, reverse=True):
        saved, aside = folder / str(step), folder / f"{step}.damaged"
        if _is_unfinished(saved):
            _logger.warning("%s was not finished: it is removed", saved)
            saved.rmtree()
            continue
        why = damage(saved)
        if aside.exists():
            aside.rmtree()
        saved.rename(aside)
        _logger.error("%s; renamed to %s; resuming from step %d", why, aside.name, max(whole, default=0))


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
    outcome = allgather_json(outcome)[0]
    if "error" in outcome:
        raise CheckpointError(outcome["error"])
    return outcome["value"]


def _is_unfinished(saved: epath.Path) -> bool:
    """Whether a step of an object store, where it has its name from the beginning, was never written to its end."""
    return not is_local(saved) and not (saved / COMMITTED).exists()


def _whole_steps(folder: epath.Path) -> list[int]:
    finished = [step for step in all_steps(folder) if not _is_unfinished(folder / str(step))]
    broken = {step: why for step in finished if (why := damage(folder / str(step), contents=False))}
    steps = [step for step in finished if step not in broken]
    while steps and (why := damage(folder / str(steps[-1]))):
        broken[steps.pop()] = why
    if broken and not steps:
        why = "; ".join(broken[step] for step in sorted(broken, reverse=True))
        raise CheckpointError(f"{folder}: no step is whole: {why}; to start anew, remove that folder")
    return steps
