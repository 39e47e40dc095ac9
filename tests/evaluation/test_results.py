"""Files that are not results or predictions are refused with one line that names them."""

from __future__ import annotations

import pathlib
import zipfile

import numpy as np
import pytest

from tclip_jax.evaluation.results import read_predictions, read_result


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is \\[\\]: it must be a mapping"),
        ("[" * 100_000, "not JSON"),
        ('{"dataset": "x"}', "lacks 'model'"),
        ('{"dataset":"x","model":"m","pretrained":"","task":"t","metrics":{"acc1":"high"}}', "metric acc1 is 'high'"),
    ],
)
def test_files_that_are_not_results_are_refused(tmp_path: pathlib.Path, content: str, message: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_result(tmp_path / "x.json")
    assert str(error.value).startswith(f"{tmp_path}/x.json")


def test_damaged_predictions_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.predictions.npz"
    np.savez_compressed(path, keys=np.random.default_rng(0).random(1000))
    whole = path.read_bytes()
    for position in range(100, len(whole) - 200, 97):
        path.write_bytes(whole[:position] + b"\xff\xff\xff" + whole[position + 3 :])
        with pytest.raises(ValueError, match=r"x\.predictions\.npz: not predictions: "):
            read_predictions(tmp_path, "x")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("labels", b"no array")
    with pytest.raises(ValueError, match=r"x\.predictions\.npz: not predictions: labels is not an array$"):
        read_predictions(tmp_path, "x")


def test_predictions_are_never_unpickled(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "x.predictions.npz", keys=np.array([{"a": 1}], object))
    with pytest.raises(ValueError, match=r"x\.predictions\.npz: not predictions"):
        read_predictions(tmp_path, "x")
    (tmp_path / "x.predictions.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"x\.predictions\.npz: not predictions"):
        read_predictions(tmp_path, "x")
    false_shape = b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999,), }\n"
    with zipfile.ZipFile(tmp_path / "x.predictions.npz", "w") as archive:
        archive.writestr("keys.npy", false_shape)
    with pytest.raises(ValueError, match=r"x\.predictions\.npz: not predictions"):
        read_predictions(tmp_path, "x")
    monkeypatch.setattr("tclip_jax.evaluation.results._MAX_PREDICTIONS", 10)
    with pytest.raises(ValueError, match=r"bytes, more than 10$"):
        read_predictions(tmp_path, "x")
    with pytest.raises(FileNotFoundError):
        read_predictions(tmp_path, "y")
