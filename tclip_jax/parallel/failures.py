"""Errors of one process that all processes raise: who ends alone leaves the others waiting, and they name no reason."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import jax

from tclip_jax.parallel.gather import gather_json

_logger = logging.getLogger(__name__)


_EVERYWHERE = "(raised by all processes)"


def agreed(error: Exception) -> Exception:
    """Notes that all processes raise this error, or one for it, at the same place: `distributed` then ends in order."""
    error.add_note(_EVERYWHERE)
    return error


@contextlib.contextmanager
def raised_by_all() -> Iterator[None]:
    """A block whose errors every process raises, since all judge by the same numbers."""
    try:
        yield
    except Exception as error:
        agreed(error)
        raise


def is_agreed(error: BaseException) -> bool:
    """Whether `agreed` was told of it."""
    return _EVERYWHERE in getattr(error, "__notes__", ())


class FailedElsewhere(ValueError):
    """What another process raised."""


class Failure:
    """The first error of this process, kept until all processes raise it together.

    Attributes:
      error: None as long as nothing failed.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Logs and keeps what the block raises."""
        try:
            yield
        except Exception as error:
            self.keep(error)

    def keep(self, error: Exception) -> None:
        """Logs and keeps an error, unless there was one before."""
        if self.error is None:
            self.error = error
            _logger.error("%s", _line(error))

    def raise_everywhere(self) -> None:
        """Raises on every process if any has failed: there what it kept, elsewhere `FailedElsewhere`.

        A collective: every process must call it, as often as the others and in the same order.
        """
        lines = gather_json(_line(self.error) if self.error else "")
        if self.error:
            raise agreed(self.error)
        for process, line in enumerate(lines):
            if line:
                raise agreed(FailedElsewhere(f"process {process}: {line}"))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that holds no collective: what one process raises in it, all raise at its end. A collective itself."""
    failure = Failure()
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        failure.error = error
    failure.raise_everywhere()


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"
