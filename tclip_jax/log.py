"""The log on stderr, in one format for all commands: lines for people, or JSON objects for machines."""

from __future__ import annotations

import datetime
import functools
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from tclip_jax.pages import printable, without_details
from tclip_jax.storage import dump_json

Form = Literal["text", "json"]

# Log lines of Orbax's worker threads that repeat an error which its first thread has logged.
_REPEATED_ERROR = re.compile(
    r"thread=write_metadata_after_commits\]|Failed to run \d+ Handler Commit operations|Save Finalize thread \("
    r"|^Task exception was never retrieved"
)

# Loggers of libraries whose errors have tracebacks.
_SHORTENED = ("absl", "asyncio", "gcsfs", "s3fs")


class TextFormatter(logging.Formatter):
    """One line for a record: time, level, message. Control characters are escaped: messages quote files and names."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return printable(super().format(record), lines=True)


class JsonFormatter(logging.Formatter):
    """One JSON object for a record: `time` (UTC), `level` and `message`, and the metrics of `with_metrics`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object on one line."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        fields = {"time": time, "level": record.levelname, "message": record.getMessage()}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return dump_json(fields | getattr(record, "metrics", {}), indent=None).rstrip("\n")


def with_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the argument `extra` of a log call that adds `metrics` to the record's JSON object."""
    return {"metrics": dict(metrics)}


_started: tuple[bool, Form] = (False, "text")


def start_logging(debug: bool = False, form: Form = "text") -> None:
    """Log to stderr: messages of this package, warnings of other libraries, and errors of absl.

    Orbax and Grain log through absl, Orbax's tasks through asyncio. A program that has configured logging itself keeps
    its handlers.

    Args:
      debug: whether to keep the tracebacks of their errors.
      form: text or json.
    """
    global _started
    _started = (debug, form)
    formatter = formatter_of(form)
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for each in logging.getLogger().handlers:
        if isinstance(each.formatter, TextFormatter | JsonFormatter):
            each.setFormatter(formatter)
    logging.getLogger("tclip_jax").setLevel(logging.INFO)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addFilter(_first_line)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns about missing files that it does not need.
    for logger in map(logging.getLogger, _SHORTENED):
        logger.removeFilter(_shorten) if debug else logger.addFilter(_shorten)


def formatter_of(form: Form) -> logging.Formatter:
    """Return the formatter of a form."""
    return JsonFormatter() if form == "json" else TextFormatter()


def in_workers() -> Callable[[], None]:
    """Return the initializer of worker processes, with which they log as this process does."""
    return functools.partial(start_logging, *_started)


def _first_line(record: logging.LogRecord) -> bool:
    """Logging filter: reduces a warning of Python to one line, without the line of source code."""
    record.msg, record.args = record.getMessage().partition("\n")[0], ()
    return True


def _shorten(record: logging.LogRecord) -> bool:
    """Logging filter: reduces a record to one line without traceback, and drops an error that Orbax repeats."""
    message = " ".join(without_details(record.getMessage()).split())
    record.msg, record.args, record.exc_info, record.exc_text = message, (), None, None
    return not _REPEATED_ERROR.search(message)
