from __future__ import annotations

import pathlib

import pytest

from tclip_jax.inference.model import Model
from tclip_jax.interop.export import export_model
from tclip_jax.numerics.torch_side import library_of


@pytest.mark.parametrize(("format_", "library"), [("open_clip", "open_clip"), ("hf", "transformers")])
def test_a_folder_is_of_the_library_whose_weights_it_holds(
    format_: str, library: str, model: Model, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "out"
    export_model(folder, config=model.config, preprocess=model.preprocess, params=model.params, formats=[format_])
    assert library_of(folder) == library


def test_what_neither_library_loads(exported: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert library_of(exported) == "open_clip"
    (tmp_path / "config.json").write_text("{}")  # of a run
    for path in (tmp_path, tmp_path / "nothing", exported / "model.safetensors", "gs://bucket/model"):
        assert library_of(path) == ""
