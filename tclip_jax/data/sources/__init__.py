"""Data sources, one file per kind: `open_source("folder:/data/cifar10", "train")`."""

from __future__ import annotations

import importlib

from tclip_jax.data.sources.base import Record, Source

__all__ = ["Record", "Source", "open_source"]

# kind -> (how to write it, "module:class" to call with what follows the colon and the split); imported when asked for.
_KINDS = {
    "digits": ("digits", "tclip_jax.data.sources.digits:Digits"),
    "folder": ("folder:<path>", "tclip_jax.data.sources.folder:Folder"),
    "tfds": ("tfds:<name>[@<data_dir>]", "tclip_jax.data.sources.tfds:Tfds"),
    "wds": ("wds:<folder>", "tclip_jax.data.sources.webdataset:Webdataset"),
}


def open_source(spec: str, split: str) -> Source:
    """Opens the data named by `spec`, a kind and what that kind needs to find it.

    Args:
      spec: `digits`, `folder:<path>`, `tfds:<name>[@<data_dir>]` or `wds:<folder>`.
      split: `train`, `test`, ..., as the kind of source defines them.

    Raises:
      ValueError: unknown kind, unknown split, or data of another layout than the kind reads.
      FileNotFoundError: the data is not where `spec` says.
    """
    kind, _, argument = spec.partition(":")
    if kind not in _KINDS:
        raise ValueError(
            f"unknown data source {spec!r}: write one of {', '.join(usage for usage, _ in _KINDS.values())}"
        )
    module, _, name = _KINDS[kind][1].partition(":")
    return getattr(importlib.import_module(module), name)(argument, split)
