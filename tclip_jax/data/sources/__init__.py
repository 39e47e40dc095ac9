"""Data sources, one file per kind: `open_source("folder:/data/cifar10", "train")`."""

from __future__ import annotations

import difflib
import importlib
import logging
import multiprocessing
from collections.abc import Callable
from typing import NamedTuple

from etils import epath

from tclip_jax.data.sources.base import FAULTS, BadSample, Record, Source, described, digest, notes
from tclip_jax.registry import Registry

__all__ = [
    "FAULTS",
    "SOURCES",
    "BadSample",
    "Record",
    "Source",
    "SourceKind",
    "check_split",
    "described",
    "digest",
    "notes",
    "open_source",
    "source_specs",
]

_logger = logging.getLogger(__name__)


class SourceKind(NamedTuple):
    """A kind of data source, an entry of `SOURCES`.

    Attributes:
      usage: how it is written, such as "folder:<path>".
      opens: (argument after the colon, split) -> source; or "module:function", which is imported on first use.
    """

    usage: str
    opens: str | Callable[[str, str], Source]

    def open(self, argument: str, split: str) -> Source:
        """Open a source."""
        if not isinstance(self.opens, str):
            return self.opens(argument, split)
        module, _, name = self.opens.partition(":")
        return getattr(importlib.import_module(f"tclip_jax.data.sources.{module}"), name)(argument, split)


SOURCES = Registry(
    "data source",
    {
        "arrayrecord": SourceKind("arrayrecord:<files>", "array_record:open_files"),
        "csv": SourceKind("csv:<files>", "table:open_csv"),
        "digits": SourceKind("digits", "digits:Digits"),
        "folder": SourceKind("folder:<path>", "folder:Folder"),
        "mixture": SourceKind("mixture:<weight>*<source>+…", "mixture:open_mixture"),
        "parquet": SourceKind("parquet:<files>", "table:open_parquet"),
        "tfds": SourceKind("tfds:<name>[@<data_dir>]", "tfds:Tfds"),
        "wds": SourceKind("wds:<tars or folder>", "webdataset:open_webdataset"),
    },
)


def open_source(spec: str, split: str) -> Source:
    """Open a data source and log its notes.

    Args:
      spec: `digits`, `folder:<path>`, `tfds:<name>[@<data_dir>]`, `wds:<tars or folder>`, `arrayrecord:<files>`,
        `csv:<files>`, `parquet:<files>`, `mixture:<weight>*<source>+…`, or that of a plug-in. Patterns of tars and
        files may use braces, globs, and `::` between patterns.
      split: `train`, `test`, … as the kind of source defines them. Tars, files and tables ignore it.

    Raises:
      ValueError: the kind or the split is unknown, the data has another layout, or there are no samples.
      FileNotFoundError: the data does not exist.
    """
    kind, _, argument = spec.partition(":")
    if kind not in SOURCES:
        usages = ", ".join(each.usage for each in SOURCES.values())
        near = difflib.get_close_matches(kind, SOURCES, 1)
        nearest = f"the nearest is {SOURCES[near[0]].usage}" if near else f"write one of {usages}, or that of a plug-in"
        raise ValueError(f"unknown data source {spec!r}: {nearest}")
    source = SOURCES[kind].open(argument, split)
    if not len(source):
        raise ValueError(f"{spec}: the source has no samples" + (f" ({split})" if kind in ("tfds", "wds") else ""))
    # Each note is logged once: the sources of a mixture are opened here too, and worker processes open them again.
    if not hasattr(source, "parts") and multiprocessing.parent_process() is None:
        for note in notes(source):
            _logger.warning("%s", note)
    return source


def source_specs(spec: str) -> list[str]:
    """Return the sources of a mixture, or the source itself."""
    kind, _, argument = spec.partition(":")
    if kind != "mixture":
        return [spec]
    from tclip_jax.data.sources.mixture import parse

    return [part for _, part in parse(argument)]


def check_split(spec: str, split: str) -> None:
    """Refuse an explicit split that a source would ignore.

    Raises:
      ValueError: the source is of files, tars or tables, which have no splits, or a folder has no such subfolder.
    """
    kind, _, argument = spec.partition(":")
    if kind == "mixture":
        for part in source_specs(spec):
            check_split(part, split)
    folder = epath.Path(argument).expanduser()
    is_of_tars = kind == "wds" and (not folder.is_dir() or any(folder.glob("*.tar")))
    if kind in ("arrayrecord", "csv", "parquet") or is_of_tars:
        raise ValueError(f"{spec}: has no splits, so there is no {split!r}")
    if kind == "folder" and folder.is_dir() and not (folder / split).is_dir():
        raise ValueError(f"{spec}: no split {split!r}: no folder of that name in it")
