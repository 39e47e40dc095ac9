"""What is to be evaluated, and the data for it, opened when its turn comes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import huggingface_hub
from etils import epath

from tclip_jax.data.prompts import get_templates, templates_for
from tclip_jax.data.sources import Source, digest, open_source
from tclip_jax.data.sources.webdataset import CLASSNAMES, DATASET_TYPE, SHARD_COUNT, TEMPLATES, Kind, Webdataset
from tclip_jax.evaluation.suite import Dataset, find_datasets
from tclip_jax.evaluation.tfds_source import MAY_DIFFER
from tclip_jax.evaluation.zero_shot import Templates

SPLIT = "test"

_logger = logging.getLogger(__name__)


class Task(NamedTuple):
    """A data set, and how to open its images and the templates of its classes; what opening needs is read only then.

    `open` may refine the data set, and raises FileNotFoundError or ValueError for data that is missing or wrong. Its
    templates are written out, not a name of them; none of captions.
    """

    dataset: Dataset
    open: Callable[[], tuple[Dataset, Source, tuple[str, ...]]]
    split: str = SPLIT


def suite_tasks(
    root: epath.PathLike, suite: str, download: bool = False, tfds: epath.PathLike | None = None
) -> list[Task]:
    """The tasks of a suite over the webdataset exports below `root`, in `<root>/wds_<name with / as ->`.

    Args:
      download: whether a missing export is fetched from `clip-benchmark/` of the Hugging Face hub.
      tfds: where TensorFlow Datasets are prepared: the images of a row that they have and whose export has none. Names
        and templates are still the export's.

    Raises:
      ValueError: a name that the suites do not have.
      FileNotFoundError: there is no such folder, and nothing is to be downloaded.
    """
    folder = epath.Path(root).expanduser()
    if not download and not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; it holds exports as wds_mnist, which --download fetches")
    return [Task(each, functools.partial(_open_export, each, folder, download, tfds)) for each in find_datasets(suite)]


def opened(tasks: Sequence[Task]) -> list[Task]:
    """The tasks with their data open, so that they can be evaluated again and again; raises what opening raises."""
    found = [(task, task.open()) for task in tasks]
    return [task._replace(open=lambda data=data: data) for task, data in found]  # type: ignore[misc]


def source_task(source: str, split: str = SPLIT, templates: Templates = "") -> Task:
    """The task of one source, written as `open_source` reads it: what is measured follows from what the source has.

    Args:
      templates: of its classes, as of `get_templates`; "" for those that its data states, as an export does.
    """
    return Task(Dataset(source, 0, 0), functools.partial(_open_source, source, split, templates), split)


def check_content(name: str, source: Source, content: str) -> None:
    """Raises ValueError unless a source has the content, as of `digest`, that a result was measured on; "" is any."""
    if content and digest(source) != content:
        raise ValueError(f"{name}: not the data that was evaluated, or changed since")


def _open_source(name: str, split: str, templates: Templates) -> tuple[Dataset, Source, tuple[str, ...]]:
    source = open_source(name, split)
    kind: Kind = "classification" if source.classnames else "retrieval"
    kind = source.kind if isinstance(source, Webdataset) else kind
    dataset = Dataset(name, 0, 0, kind=kind)
    if kind == "retrieval":
        if templates:
            raise ValueError(f"{name}: has captions, which are taken as they are: templates are for class names")
        return dataset, source, ()
    used = templates_for(source, templates)
    whose = "as asked for" if templates else "its own" if getattr(source, "templates", None) else "it states none"
    _logger.info(
        "%s: %d templates (%s): %s", name, len(used), whose, ", ".join(map(repr, used[:3])) + "…"[: len(used) // 4]
    )
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
        raise ValueError(f"{folder}: {DATASET_TYPE} makes it {source.kind}, where {dataset.name} is {dataset.kind}")
    if len(source.classnames) != dataset.classes:
        raise ValueError(
            f"{folder / CLASSNAMES}: {len(source.classnames)} names, where {dataset.name} has {dataset.classes}"
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
    from tclip_jax.evaluation.tfds_source import TfdsRow

    if download and dataset.classes and not all((folder / name).exists() for name in (CLASSNAMES, TEMPLATES)):
        fetch(dataset.folder, folder)
    source = TfdsRow(dataset, data_dir, folder)
    if dataset.name in MAY_DIFFER:
        _logger.warning("%s: from TFDS, which may hold other images than the webdataset export", dataset.name)
    return dataset, source, get_templates(source.templates) if source.templates else ()


def fetch(name: str, folder: epath.Path, split: str | None = None) -> None:
    """Downloads names and templates of `clip-benchmark/<name>`, and a split; raises FileNotFoundError where that fails.

    The file that tells that the split is there comes last: a download that was stopped is taken up by the next call.
    """
    # By name: "*.txt" would also match the counts of shards in splits that are not fetched.
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
    # Its errors are the HTTP library's and its own, and have many lines.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"clip-benchmark/{name}: not downloaded: {reason}") from None
