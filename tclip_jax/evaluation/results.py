"""Result files: one JSON per data set in the schema of CLIP_benchmark, with the predictions next to it."""

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
PROBE_C = "C"  # a metric of the linear probe: the selected inverse regularisation strength
_MADE_BY = "made_by"
_MAX_PREDICTIONS = 1 << 30  # bytes after decompression; the largest of the 41 data sets has 20 MB
Predictions = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Result:
    """The evaluation result of a model on a data set. The first six fields are those of CLIP_benchmark.

    Attributes:
      dataset: name of the data set, as in `DATASETS`.
      model: name of the model.
      pretrained: identity of the weights: a hash, or the step of a run.
      task: zeroshot_classification, zeroshot_retrieval, linear_probe or <k>_shot.
      metrics: fractions in [0, 1] by name, except `PROBE_C`; NaN if a metric is undefined.
      language: language of the class names and captions.
      dtype: dtype of the computation.
      versions: versions of the libraries, and the kind and number of devices.
      seconds: wall time.
      samples: number of images that the metrics count.
      failed: number of images that the metrics do not count, by reason.
      made_by: everything that determines the metrics, from `keys.recipe`; empty in files of other programs.
      source: where the data was, a specification for `open_source`; "" for an export of a suite.
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
    source: str = ""


def result_path(out: epath.PathLike, dataset: str) -> epath.Path:
    """Return the path of a result: `vtab-cifar10.json` for `vtab/cifar10`."""
    return epath.Path(out) / f"{dataset.replace('/', '-')}.json"


def predictions_path(out: epath.PathLike, dataset: str) -> epath.Path:
    """Return the path of the predictions, next to the result."""
    return result_path(out, dataset).with_suffix(".predictions.npz")


def write_result(out: epath.PathLike, result: Result, predictions: Predictions) -> None:
    """Write `<dataset>.predictions.npz`, then `<dataset>.json`. If the JSON exists, both files are complete."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **predictions, **{_MADE_BY: np.array(digest(result.made_by))})  # type: ignore[arg-type]
    write_atomic(predictions_path(out, result.dataset), buffer.getvalue())
    write_atomic(result_path(out, result.dataset), dump_json(dataclasses.asdict(result)))


def read_result(path: epath.PathLike) -> Result:
    """Read a result from a JSON file of this program or of CLIP_benchmark.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is not a result.
    """
    path = epath.Path(path)
    try:
        fields = json.loads(path.read_text(), parse_constant=lambda _: None)  # CLIP_benchmark writes NaN, we write null
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    known = [field.name for field in dataclasses.fields(Result)]
    if isinstance(fields, dict):  # CLIP_benchmark may add class names and templates
        fields = {name: value for name, value in fields.items() if name in known}
    result = from_mapping(Result, fields, str(path))
    for name, value in result.metrics.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{path}: metric {name} is {value!r}: it must be a number or null")
    metrics = {name: math.nan if value is None else float(value) for name, value in result.metrics.items()}
    return dataclasses.replace(result, metrics=metrics)


def find_result(out: epath.PathLike, dataset: str, made_by: Recipe) -> Result | None:
    """Return the existing result of a data set in `out`, or None.

    Raises:
      ValueError: the file is not a result, has no `made_by`, or was made with different inputs.
    """
    path = result_path(out, dataset)
    if not path.exists():
        return None
    result = read_result(path)
    if not result.made_by:
        raise ValueError(f"{path}: it does not record what made it (made_by); choose another folder")
    if differs := difference(result.made_by, made_by):
        raise ValueError(f"{path}: made with different inputs ({differs}); choose another folder")
    return result


def read_predictions(out: epath.PathLike, dataset: str, made_by: Recipe | None = None) -> Predictions:
    """Read the predictions of a result: arrays with one row per counted image, in the order of the data set.

    Args:
      out: folder of the result.
      dataset: name of the data set.
      made_by: `made_by` of the result; None or empty to skip the check.

    Returns:
      Arrays by name. All kinds have `keys` (N,), image names that are the same in every run, and `index` (N,), indices
      in the source. In addition:
        single-label: `labels` (N,) and `top` (N, min(5, C)), the most probable classes;
        few-shot: `labels` (N,) and `share` (N,), the fraction of draws with a correct prediction;
        multi-label: `labels` (N, C) and `scores` (N, C);
        retrieval: `text_rank` (N,), and per caption `text_to_image` (M,), a row of `keys`, and `image_rank` (M,);
          rank 0 is first.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is not an archive of plain arrays, or belongs to another result.
    """
    path = predictions_path(out, dataset)
    try:
        with path.open("rb") as file:
            size = sum(member.file_size for member in zipfile.ZipFile(file).infolist())
            if size > _MAX_PREDICTIONS:
                raise ValueError(f"{size:,} bytes, more than {_MAX_PREDICTIONS:,}")
            file.seek(0)
            arrays = read_arrays(file)
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not predictions: {error}") from None
    stored = arrays.pop(_MADE_BY, None)
    if made_by and (stored is None or str(stored) != digest(made_by)):
        raise ValueError(f"{path}: these predictions do not belong to the result next to them (made_by differs)")
    return arrays


def read_arrays(file: IO[bytes]) -> dict[str, npt.NDArray[Any]]:
    """Read the plain arrays of an untrusted .npz file.

    Raises:
      ValueError: the file is damaged or not an archive of plain arrays.
    """
    try:
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("a single array, not an archive of arrays")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
    # RuntimeError: an encrypted member, or a compression that zipfile does not support.
    except (EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error)) from None
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # NumPy returns any other member as bytes
            raise ValueError(f"{name} is not an array")
    return arrays
