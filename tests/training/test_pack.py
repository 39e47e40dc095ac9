"""A run is packed, verified and inspected on the command line."""

from __future__ import annotations

import json
import pathlib

import ml_collections
import pytest

from tclip_jax.artifacts import read_artifact, write_artifact
from tclip_jax.cli import main
from tclip_jax.training import loop


@pytest.mark.slow
def test_a_run_is_packed_verified_and_inspected(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.steps, config.ternary, config.quantizer.group = 1, "Q-ALL", 8
    run, packed, other = (str(tmp_path / name) for name in ("run", "packed", "other"))
    loop.train(config, run)
    (tmp_path / "figures.json").write_text('{"accuracy": 0.5}')
    assert main(["pack", run, "--out", packed, "--figures", str(tmp_path / "figures.json")]) == 0
    capsys.readouterr()

    assert main(["verify", packed, run]) == main(["verify", packed, packed]) == 0
    assert all(line.endswith(": all equal") for line in capsys.readouterr().out.splitlines())
    model = read_artifact(packed)
    model.params["text"]["ln_final"]["bias"][0] = 7
    write_artifact(other, config=model.config, preprocess=model.preprocess, params=model.params, rules=model.rules)
    assert main(["verify", other, run]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first == "text/ln_final/bias: 1 of 16 values as float16 differ, the first at (0,)"
    assert last.startswith(f"{other}: ") and last.endswith(f"compared with {run}: 1 differences")
    assert main(["verify", other, run, "--json"]) == 1
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["differences"] == [first] and outcome["trits"] > 49408 * 16
    assert main(["verify", packed, str(tmp_path / "nowhere")]) == 2
    assert "no such file or folder; expected the workdir" in capsys.readouterr().err

    assert main(["inspect", packed, "--json", "--plot", str(tmp_path / "plot.png")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["figures"] == {"accuracy": 0.5} and report["provenance"]["step"] == 1
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", packed]) == 0
    assert "  accuracy: 0.5" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[1]", "holds list: it must hold one JSON")])
def test_figures_are_one_json_object(
    content: str, message: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "figures.json").write_text(content)
    arguments = ["pack", str(tmp_path), "--out", str(tmp_path / "out"), "--figures", str(tmp_path / "figures.json")]
    assert main(arguments) == 2
    assert f"figures.json {message}" in capsys.readouterr().err
