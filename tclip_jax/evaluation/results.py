"""Results on disk: one JSON per data set in CLIP_benchmark's schema, the predictions beside it, and a summary."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import zipfile
import zlib
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.keys import Recipe, difference, digest
from tclip_jax.schema import from_mapping
from tclip_jax.storage import dump_json, write_atomic

SUMMARY = "summary.json"
PROBE_C = "C"  # among the metrics of a linear probe: the C that was chosen
_MADE_BY = "made_by"
_MAX_PREDICTIONS = 1 << 30  # bytes unpacked; the largest of the 41 have 20 MB
Predictions = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured of a model on a data set; the first six fields are CLIP_benchmark's.

    Attributes:
      dataset: name, as in the table of the suite.
      model: what was evaluated, as it was named.
      pretrained: which weights: a hash of them, or the step of a run.
      task: zeroshot_classification, zeroshot_retrieval, or the name of a further suite's.
      metrics: fractions 0–1 by name, but for `PROBE_C`; NaN where a metric is not defined.
      language: of the class names and captions.
      dtype: of the computation.
      versions: of the libraries, and the kind of device.
      seconds: wall time.
      samples: images that count in the metrics.
      failed: images that do not, by reason.
      made_by: everything that decides the metrics, as of `keys.recipe`; empty in files of other programs.
    """

    dataset: str
    model: str
    pretrained: str
    task: str
    metrics: dict[str, Any]
    language: str = "en"
    dtype: str = "float32"
    versions: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    samples: int = 0
    failed: dict[str, Any] = dataclasses.field(default_factory=dict)
    made_by: dict[str, Any] = dataclasses.field(default_factory=dict)


def result_path(out: epath.PathLike, dataset: str) -> epath.Path:
    """Where the result of a data set lies: `vtab/cifar10` in `vtab-cifar10.json`."""
    return epath.Path(out) / f"{dataset.replace('/', '-')}.json"


def predictions_path(out: epath.PathLike, dataset: str) -> epath.Path:
    """Where the predictions of a data set lie, beside its result."""
    return result_path(out, dataset).with_suffix(".predictions.npz")


def write_result(out: epath.PathLike, result: Result, predictions: Predictions) -> None:
    """Writes `<dataset>.predictions.npz`, then `<dataset>.json`: where the JSON is, both are whole."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **predictions, **{_MADE_BY: np.array(digest(result.made_by))})  # type: ignore[arg-type]
    write_atomic(predictions_path(out, result.dataset), buffer.getvalue())
    write_atomic(result_path(out, result.dataset), dump_json(dataclasses.asdict(result)))


def read_result(path: epath.PathLike) -> Result:
    """The result in a JSON file, ours or CLIP_benchmark's.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a result; one line.
    """
    path = epath.Path(path)
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    known = [field.name for field in dataclasses.fields(Result)]
    if isinstance(found, dict):  # CLIP_benchmark may add class names and templates
        found = {name: value for name, value in found.items() if name in known}
    result = from_mapping(Result, found, str(path))
    for name, value in result.metrics.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{path}: metric {name} is {value!r}: it must be a number or null")
    metrics = {name: math.nan if value is None else float(value) for name, value in result.metrics.items()}
    return dataclasses.replace(result, metrics=metrics)


def find_result(out: epath.PathLike, dataset: str, made_by: Recipe) -> Result | None:
    """The result of a data set that is in `out` already, or None.

    Raises:
      ValueError: something else made it, it does not say what, or it is no result.
    """
    path = result_path(out, dataset)
    if not path.exists():
        return None
    result = read_result(path)
    if not result.made_by:
        raise ValueError(f"{path}: it does not say what made it, so it may be of anything: choose another folder")
    if differs := difference(result.made_by, made_by):
        raise ValueError(f"{path}: made by something else ({differs}): choose another folder")
    return result


def read_predictions(out: epath.PathLike, dataset: str, made_by: Recipe | None = None) -> Predictions:
    """The arrays beside a result, one row per image that counts, in the order of the data set.

    Always `keys` (N,), a name for each image that is the same in every run on this data, and `index` (N,), its place in
    the source. Of classification `labels` (N,) and `top` (N, min(5, C)), the most probable classes, or of few-shot
    `labels` and `share` (N,), of the draws that were right; of several labels `labels` (N, C) and `scores` (N, C); of
    retrieval `text_rank` (N,), and for each caption `text_to_image` (M,) (a row of `keys`) and `image_rank` (M,), where
    rank 0 is first.

    Args:
      made_by: that of the result beside them; None or empty if it has none.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not an archive of plain arrays, or something else made them; one line.
    """
    path = predictions_path(out, dataset)
    try:
        with path.open("rb") as file:
            size = sum(member.file_size for member in zipfile.ZipFile(file).infolist())
            if size > _MAX_PREDICTIONS:
                raise ValueError(f"{size:,} bytes, where at most {_MAX_PREDICTIONS:,} are expected")
            file.seek(0)
            arrays = read_arrays(file)
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not predictions: {error}") from None
    theirs = arrays.pop(_MADE_BY, None)
    if made_by and (theirs is None or str(theirs) != digest(made_by)):
        raise ValueError(f"{path}: not the predictions of the result beside it: something else made them")
    return arrays


def read_arrays(file: IO[bytes]) -> dict[str, npt.NDArray[Any]]:
    """The plain arrays in an .npz file, which is not trusted.

    Raises:
      ValueError: another file, or a damaged one.
    """
    try:
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("one array, not an archive of them")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
    # RuntimeError: a member that is encrypted, or compressed as zipfile cannot.
    except (EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error)) from None
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # NumPy gives the bytes of any other file
            raise ValueError(f"{name} is no array")
    return arrays
