"""Data sources, one file per kind: `open_source("folder:/data/cifar10", "train")`."""

from __future__ import annotations

import importlib
import logging
import multiprocessing

from etils import epath

from tclip_jax.data.sources.base import FAULTS, BadSample, Record, Source, described, digest, notes

__all__ = ["FAULTS", "BadSample", "Record", "Source", "check_split", "described", "digest", "notes", "open_source"]

_logger = logging.getLogger(__name__)

# kind -> (usage, "module:function" to call with the argument after the colon and the split); imported on first use.
_KINDS = {
    "arrayrecord": ("arrayrecord:<files>", "tclip_jax.data.sources.array_record:open_files"),
    "csv": ("csv:<files>", "tclip_jax.data.sources.table:open_csv"),
    "digits": ("digits", "tclip_jax.data.sources.digits:Digits"),
    "folder": ("folder:<path>", "tclip_jax.data.sources.folder:Folder"),
    "mixture": ("mixture:<weight>*<source>+…", "tclip_jax.data.sources.mixture:open_mixture"),
    "parquet": ("parquet:<files>", "tclip_jax.data.sources.table:open_parquet"),
    "tfds": ("tfds:<name>[@<data_dir>]", "tclip_jax.data.sources.tfds:Tfds"),
    "wds": ("wds:<tars or folder>", "tclip_jax.data.sources.webdataset:open_webdataset"),
}


def open_source(spec: str, split: str) -> Source:
    """Open a data source and log its notes.

    Args:
      spec: `digits`, `folder:<path>`, `tfds:<name>[@<data_dir>]`, `wds:<tars or folder>`, `arrayrecord:<files>`,
        `csv:<files>`, `parquet:<files>` or `mixture:<weight>*<source>+…`. Patterns of tars and files may use braces,
        globs, and `::` between patterns.
      split: `train`, `test`, … as the kind of source defines them. Tars, files and tables ignore it.

    Raises:
      ValueError: the kind or the split is unknown, the data has another layout, or there are no samples.
      FileNotFoundError: the data does not exist.
    """
    kind, _, argument = spec.partition(":")
    if kind not in _KINDS:
        raise ValueError(
            f"unknown data source {spec!r}: write one of {', '.join(usage for usage, _ in _KINDS.values())}"
        )
    module, _, name = _KINDS[kind][1].partition(":")
    source = getattr(importlib.import_module(module), name)(argument, split)
    if not len(source):
        raise ValueError(f"{spec}: the source has no samples" + (f" ({split})" if kind in ("tfds", "wds") else ""))
    # Each note is logged once: the sources of a mixture are opened here too, and worker processes open them again.
    if not hasattr(source, "parts") and multiprocessing.parent_process() is None:
        for note in notes(source):
            _logger.warning("%s", note)
    return source


def check_split(spec: str, split: str) -> None:
    """Refuse an explicit split that a source would ignore.

    Raises:
      ValueError: the source is of files, tars or tables, which have no splits, or a folder has no such subfolder.
    """
    kind, _, argument = spec.partition(":")
    if kind == "mixture":
        from tclip_jax.data.sources.mixture import parse

        for _, part in parse(argument):
            check_split(part, split)
    folder = epath.Path(argument).expanduser()
    if kind in ("arrayrecord", "csv", "parquet") or (kind == "wds" and not folder.is_dir()):
        raise ValueError(f"{spec}: has no splits, so there is no {split!r}")
    if kind == "folder" and folder.is_dir() and not (folder / split).is_dir():
        raise ValueError(f"{spec}: no split {split!r}: no folder of that name in it")
