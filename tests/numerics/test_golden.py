from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from tclip_jax.data.images import Preprocess
from tclip_jax.inference.model import Model
from tclip_jax.numerics.activations import activations_report, record
from tclip_jax.numerics.golden import Recording, model_recipe, read_golden, write_golden

RNG = np.random.default_rng(0)
RECORDING = Recording(
    pixels=RNG.standard_normal((2, 4, 4, 3), np.float32),
    tokens=RNG.integers(0, 49408, (2, 7), np.int32),
    # The order is not alphabetical, and the arrays are not contiguous.
    taps={"image/b": RNG.standard_normal((3, 2), np.float32).T, "image/a": np.float32([[np.nan, -0.0]])},
    logit_scale=14.285714285714286,
    facts={"run by": "nobody — ß"},
    made_by={"config": {"embed_dim": 24}},
)


def test_round_trip_keeps_every_bit_and_the_order(tmp_path: pathlib.Path) -> None:
    write_golden(tmp_path / "golden", RECORDING)
    loaded = read_golden(tmp_path / "golden")
    assert [path.name for path in tmp_path.iterdir()] == ["golden"]
    assert loaded.logit_scale == RECORDING.logit_scale and loaded.facts == RECORDING.facts
    assert loaded.made_by == RECORDING.made_by
    assert list(loaded.taps) == ["image/b", "image/a"]
    for name, tap in RECORDING.taps.items():
        np.testing.assert_array_equal(loaded.taps[name].view(np.int32), np.ascontiguousarray(tap).view(np.int32))
    np.testing.assert_array_equal(loaded.pixels, RECORDING.pixels)
    np.testing.assert_array_equal(loaded.tokens, RECORDING.tokens)
    assert loaded.tokens.dtype == np.int32


def test_refuses_what_is_no_golden_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "golden"
    with pytest.raises(FileNotFoundError, match="golden: no such file; `tclip compare golden dump` writes one"):
        read_golden(path)
    write_golden(path, RECORDING)
    whole = path.read_bytes()
    for broken in (b"", whole[:5], whole[:-1], b"{}" * 30, whole.replace(b'"tclip_golden":"2"', b'"tclip_golden":"3"')):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="golden: not a golden file, or a damaged one: "):
            read_golden(path)
    for header in ("[]", '{"taps": 3}', '{"taps": [], "logit_scale": [], "facts": {}, "made_by": {}}'):
        inputs = {"input/pixels": np.zeros(2), "input/tokens": np.zeros(2)}
        path.write_bytes(safetensors.numpy.save(inputs, {"tclip_golden": "2", "json": header}))
        with pytest.raises(ValueError, match="golden: not a golden file, or a damaged one: "):
            read_golden(path)
    for metadata in (None, {"tclip_golden": "2"}, {"tclip_golden": "2", "json": '{"taps": ["image/b"]}'}):
        path.write_bytes(safetensors.numpy.save({"a": np.zeros(2)}, metadata))
        with pytest.raises(ValueError, match="golden: not a golden file: it lacks "):
            read_golden(path)


def test_a_golden_file_of_another_shape_or_preprocessing_does_not_pass(
    model: Model, batch: tuple[np.ndarray, np.ndarray], tmp_path: pathlib.Path
) -> None:
    """A recording holds normalised pixels, so only its recipe reveals that the model has another mean."""
    write_golden(tmp_path / "golden", record(model, *batch)._replace(made_by=model_recipe(model)))
    reference = read_golden(tmp_path / "golden")
    same = activations_report("", model, reference)
    assert same.passed and not same.configurations
    grey = dataclasses.replace(model, preprocess=Preprocess(16, mean=(0.5,) * 3))
    report = activations_report("", grey, reference)
    assert not report.passed
    assert report.configurations == {"preprocess.mean": ([0.5] * 3, [0.48145466, 0.4578275, 0.40821073])}
    assert report.guess == "the images are preprocessed differently; from equal pixels both models compute the same"
