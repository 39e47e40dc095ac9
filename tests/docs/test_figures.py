"""The figures of the pages are what their scripts draw, from the package's own arithmetic."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys

import pytest
from pages import ROOT

from benchmarks import overview

spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
assert spec is not None and spec.loader is not None
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)


def test_every_figure_of_concepts_is_drawn_and_small(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    figures.main()
    assert {path.stem for path in tmp_path.iterdir()} == set(figures.FIGURES)
    for path in tmp_path.iterdir():
        committed = ROOT / "docs" / "figures" / path.name
        assert f"](figures/{path.name})" in (ROOT / "docs" / "concepts.md").read_text() and path.stat().st_size < 30_000
        assert committed.read_text().count("<text") == path.read_text().count("<text")


def test_overview_shows_the_figures_of_a_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = {"teacher_accuracy": 0.5, "student_accuracy": 0.4, "compression_real": 20.0, "artifact_bytes": 1_500_000}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    times = {"OpenVINO float32": 125.0, "JAX float32 (XLA)": 140.0, "tclip_jax A16": 100.0, "tclip_jax A8": 40.0}
    rows = [
        {"runtime": name, "batch": batch, "least_ms": ms * batch / 8} for name, ms in times.items() for batch in (1, 8)
    ]
    (tmp_path / "runtimes.json").write_text(json.dumps({"rows": rows}))
    out = tmp_path / "overview.svg"
    call = ["overview", "--workdir", str(tmp_path), "--runtimes", str(tmp_path / "runtimes.json"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", call)
    assert overview.main() == 0 and f"{out}: " in capsys.readouterr().out
    text = out.read_text()
    shown = [
        "30.00 MB",
        "1.50 MB",
        "20.0x smaller",
        "50.00 %",
        "40.00 %",
        "-10.00 points",
        "125 ms",
        "40 ms",
        "OpenVINO float32",
    ]
    assert all(each in text for each in shown) and len(text) < 100_000
