"""`tclip pack` says what to do with a folder that is not a run."""

from __future__ import annotations

import pathlib

import pytest

from tclip_jax.cli import main


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tclip.json", "{}", "x is an artifact, already packed: expected the workdir of `tclip train`"),
        ("open_clip_config.json", "{}", "x is a checkpoint of another library: `tclip import` makes an artifact of it"),
        ("config.json", '{"model_type": "clip"}', "x is a checkpoint of another library: `tclip import` makes"),
    ],
)
def test_a_folder_that_is_not_a_run_is_refused_with_what_to_do(
    file: str,
    text: str,
    message: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / file).write_text(text)
    assert main(["pack", "x", "--out", "artifact"]) == 2
    assert capsys.readouterr().err.startswith(f"tclip pack: error: {message}")
    assert not (tmp_path / "artifact").exists()
