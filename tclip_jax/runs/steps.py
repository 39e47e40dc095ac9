"""The saved steps of a run: which of them are whole, and which one is read or resumed."""

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
    """Return the steps with a sub-folder in `folder`, ascending, whole or not; [] if `folder` does not exist."""
    folder = epath.Path(folder)
    names = [path.name for path in (folder.iterdir() if folder.is_dir() else ())]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and name == str(int(name)))


def saved_steps(folder: epath.PathLike) -> list[int]:
    """Return the steps whose files all exist with the right lengths; reading a step compares the contents too."""
    folder = epath.Path(folder)
    return [step for step in all_steps(folder) if not damage(folder / str(step), contents=False)]


def whole_steps(folder: epath.PathLike) -> list[int]:
    """Return `saved_steps` without damaged steps at its end; training resumes from the last remaining step.

    The files are unchanged; `set_aside` renames the damaged steps. A collective: process 0 decides.

    Raises:
      CheckpointError: steps exist, but none is whole. Starting again would overwrite the run.
    """
    return decided(lambda: _whole_steps(epath.Path(folder)))


def set_aside(folder: epath.PathLike, whole: Sequence[int]) -> None:
    """Rename the steps that are not in `whole` to `<step>.damaged`, and remove unfinished ones; log both."""
    folder = epath.Path(folder)
    for step in sorted({*all_steps(folder)} - {*whole}, reverse=True):
        saved, aside = folder / str(step), folder / f"{step}.damaged"
        if _is_unfinished(saved):
            _logger.warning("%s: removing this unfinished checkpoint", saved)
            saved.rmtree()
            continue
        why = damage(saved)
        if aside.exists():
            aside.rmtree()
        saved.rename(aside)
        _logger.error("%s; renamed to %s; resuming from step %d", why, aside.name, max(whole, default=0))


def first_whole(folder: epath.PathLike, steps: Sequence[int], part: str = "") -> int:
    """Return the first whole step of `steps`; log why earlier ones are not whole. A collective: process 0 decides.

    Args:
      folder: the checkpoints of a run.
      steps: in the order of preference.
      part: check only this sub-folder, written with a final "/".

    Raises:
      CheckpointError: no step is whole.
    """
    folder = epath.Path(folder)

    def decide() -> int:
        damages: list[str] = []
        for step in steps:
            if not (why := damage(folder / str(step), part)):
                for line in damages:
                    _logger.error("%s: reading step %d instead", line, step)
                return step
            damages.append(why)
        raise CheckpointError(
            "; ".join(damages) or f"{folder}: no checkpoint; expected a folder written by `tclip train`"
        )

    return decided(decide)


def decided(decide: Callable[[], Any]) -> Any:
    """Run `decide` on process 0; return its result or raise its error on every process. A collective.

    Decisions about files belong to one process: a file that one machine has written may not be visible to another yet.

    Raises:
      CheckpointError: `decide` raised ValueError or OSError.
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
    """Whether a step on an object store lacks its commit file; there, a step has its final name while it is written."""
    return not is_local(saved) and not (saved / COMMITTED).exists()


def _whole_steps(folder: epath.Path) -> list[int]:
    finished = [step for step in all_steps(folder) if not _is_unfinished(folder / str(step))]
    broken = {step: why for step in finished if (why := damage(folder / str(step), contents=False))}
    steps = [step for step in finished if step not in broken]
    while steps and (why := damage(folder / str(steps[-1]))):
        broken[steps.pop()] = why
    if broken and not steps:
        why = "; ".join(broken[step] for step in sorted(broken, reverse=True))
        raise CheckpointError(f"{folder}: no step is whole: {why}; to start again, remove that folder")
    return steps
