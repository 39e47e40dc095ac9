"""Evaluation tasks: a data set, and a function that opens its images when the task starts."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import huggingface_hub
from etils import epath

from tclip_jax.data.prompts import get_templates, templates_for
from tclip_jax.data.sources import Source, digest, open_source
from tclip_jax.data.sources.webdataset import CLASSNAMES, DATASET_TYPE, SHARD_COUNT, TEMPLATES, Kind, Webdataset
from tclip_jax.evaluation.results import SUMMARY
from tclip_jax.evaluation.suite import Dataset, find_datasets
from tclip_jax.evaluation.tfds_source import MAY_DIFFER, TfdsRow
from tclip_jax.evaluation.zero_shot import Templates

SPLIT = "test"
_SPLITS = ("train", "test", "val", "valid", "validation")
_SUFFIX = re.compile(r"\.(csv|tsv|parquet|tar|array_?record)$")
_SUMMARY = SUMMARY.removesuffix(".json")

_logger = logging.getLogger(__name__)


class Task(NamedTuple):
    """A data set to evaluate.

    Attributes:
      dataset: the data set, as far as it is known before its data is opened.
      open: opens the data and returns the data set, its source, and its templates as a list of captions with `{c}`,
        which is empty for retrieval. It raises FileNotFoundError or ValueError if data is missing or invalid.
      split: name of the split.
      source: specification for `open_source`; "" for an export of a suite.
    """

    dataset: Dataset
    open: Callable[[], tuple[Dataset, Source, tuple[str, ...]]]
    split: str = SPLIT
    source: str = ""


def suite_tasks(
    root: epath.PathLike, suite: str, download: bool = False, tfds: epath.PathLike | None = None
) -> list[Task]:
    """Return the tasks of a suite over the webdataset exports `<root>/wds_<name>`, where `/` in a name becomes `-`.

    Args:
      root: folder of the exports.
      suite: comma-separated suites and data sets; see `find_datasets`.
      download: fetch missing exports from `clip-benchmark/` on the Hugging Face hub.
      tfds: folder of prepared TensorFlow Datasets. They provide the images of a data set whose export has no images;
        class names and templates still come from the export.

    Raises:
      ValueError: the suite has an unknown name.
      FileNotFoundError: `root` does not exist, and `download` is False.
    """
    folder = epath.Path(root).expanduser()
    if not download and not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; it must hold exports such as wds_mnist (or use --download)")
    return [Task(each, functools.partial(_open_export, each, folder, download, tfds)) for each in find_datasets(suite)]


def opened(tasks: Sequence[Task]) -> list[Task]:
    """Open the data of all tasks, so that repeated evaluations do not open it again. See `open` for errors."""
    pairs = [(task, task.open()) for task in tasks]
    return [task._replace(open=lambda data=data: data) for task, data in pairs]  # type: ignore[misc]


def source_task(source: str, split: str = SPLIT, templates: Templates = "") -> Task:
    """Return the task of a single source. Its data determines the kind of evaluation.

    Args:
      source: argument of `named_source`.
      split: name of the split.
      templates: argument of `get_templates`; "" for the templates of the data.

    Raises:
      ValueError: the name of the data set is not valid.
    """
    name, spec = named_source(source)
    return Task(Dataset(name, 0, 0), functools.partial(_open_source, name, spec, split, templates), split, spec)


def named_sources(sources: Sequence[str]) -> list[tuple[str, str]]:
    """Return `named_source` of each; raise ValueError if two have one name."""
    pairs = [named_source(source) for source in sources]
    names = [name.replace("/", "-") for name, _ in pairs]  # as in the names of their files
    if repeated := next((name for name in names if names.count(name) > 1), ""):
        raise ValueError(f"two data sets are named {repeated!r}: write NAME=SOURCE for one of them")
    return pairs


def named_source(text: str) -> tuple[str, str]:
    """Return the name of a data set and the specification of its source.

    Args:
      text: `NAME=SOURCE`; or only SOURCE, which is named after the last folder or file in it: `folder:/data/birds` and
        `wds:/data/birds/*.tar` are birds.

    Raises:
      ValueError: the name has a character that is not a letter, digit or one of _ . + - /, or names another file.
    """
    if match := re.fullmatch(r"([^:=]*)=(.*)", text, re.DOTALL):
        name, spec = match.groups()
        if not re.fullmatch(r"\w[\w./+-]*", name):
            raise ValueError(f"the name {name!r} of {spec}: it must be letters, digits and _ . + - /")
        if name == _SUMMARY:
            raise ValueError(f"the name {name!r} of {spec}: {name}.json is another file of the results")
        return name, spec
    kind, _, path = text.partition(":")
    path = path if kind == "folder" else re.split(r"@|\?|::", path)[0]
    parts = [
        part.strip(".") for part in path.split("/") if kind != "mixture" and re.fullmatch(r"[\w.+ -]*\w[\w.+ -]*", part)
    ]
    words = parts[-2:] if kind == "tfds" or (parts and parts[-1] in _SPLITS) else parts[-1:]
    name = re.sub(" +", "-", _SUFFIX.sub("", "-".join(words))) or kind
    return (f"{kind}-{name}" if name == _SUMMARY else name), text


def check_content(name: str, source: Source, content: str) -> None:
    """Raise ValueError if the `digest` of a source differs from that of a result; "" skips the check."""
    if content and digest(source) != content:
        raise ValueError(f"{name}: the data has changed since the evaluation")


def _open_source(name: str, spec: str, split: str, templates: Templates) -> tuple[Dataset, Source, tuple[str, ...]]:
    source = open_source(spec, split)
    kind: Kind = "classification" if source.classnames else "retrieval"
    kind = source.kind if isinstance(source, Webdataset) else kind
    dataset = Dataset(name, 0, 0, kind=kind)
    if kind == "retrieval":
        if templates:
            raise ValueError(f"{name}: has captions, and templates apply only to class names")
        return dataset, source, ()
    used = templates_for(source, templates)
    origin = "from the arguments" if templates else "from the data" if getattr(source, "templates", None) else "default"
    shown = ", ".join(map(repr, used[:3])) + "…"[: len(used) // 4]
    _logger.info("%s: %d templates (%s): %s", name, len(used), origin, shown)
    return dataset, source, used


def _open_export(
    dataset: Dataset, root: epath.Path, download: bool, tfds: epath.PathLike | None
) -> tuple[Dataset, Source, tuple[str, ...]]:
    folder = root / dataset.folder
    missing = not (folder / SPLIT / SHARD_COUNT).exists()
    if missing and tfds and dataset.tfds:
        return _open_tfds(dataset, folder, download, tfds)
    if download and missing:
        fetch(dataset.folder, folder, SPLIT)
    source = Webdataset(str(folder), SPLIT)
    for note in source.notes:
        _logger.warning("%s", note)
    if source.kind != dataset.kind:
        raise ValueError(f"{folder}: the kind is {source.kind} by {DATASET_TYPE}, but {dataset.name} is {dataset.kind}")
    if len(source.classnames) != dataset.classes:
        raise ValueError(
            f"{folder / CLASSNAMES}: {len(source.classnames)} names, but {dataset.name} has {dataset.classes} classes"
        )
    if dataset.kind == "retrieval":
        return dataset, source, ()
    try:
        return dataset, source, get_templates(source.templates)
    except ValueError as error:
        raise ValueError(f"{folder / TEMPLATES}: {error}") from None


def _open_tfds(
    dataset: Dataset, folder: epath.Path, download: bool, data_dir: epath.PathLike
) -> tuple[Dataset, Source, tuple[str, ...]]:
    if download and dataset.classes and not all((folder / name).exists() for name in (CLASSNAMES, TEMPLATES)):
        fetch(dataset.folder, folder)
    source = TfdsRow(dataset, data_dir, folder)
    if dataset.name in MAY_DIFFER:
        _logger.warning("%s: the images of TFDS may differ from those of the webdataset export", dataset.name)
    return dataset, source, get_templates(source.templates) if source.templates else ()


def fetch(name: str, folder: epath.Path, split: str | None = None) -> None:
    """Download the class names and templates of `clip-benchmark/<name>`, and optionally a split.

    The shard count of the split is downloaded last, so an interrupted download is resumed by the next call.

    Raises:
      FileNotFoundError: the download failed.
    """
    # Exact names: "*.txt" would also match the shard counts of other splits.
    steps = [[CLASSNAMES, TEMPLATES, DATASET_TYPE]]
    if split:
        steps += [[f"{split}/*.tar"], [f"{split}/{SHARD_COUNT}"]]
    try:
        for patterns in steps:
            huggingface_hub.snapshot_download(
                f"clip-benchmark/{name}",
                repo_type="dataset",
                local_dir=str(folder),
                allow_patterns=patterns,
            )
    # huggingface_hub raises its own errors and those of its HTTP library; only their first line is useful.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"clip-benchmark/{name}: download failed: {reason}") from None
