"""`tclip push`: its options, its question and its exit codes."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from tclip_jax.cli import main
from tests.hub_server import TOKEN, Hub, hub_server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def command(tmp_path: pathlib.Path) -> list[str]:
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "README.md").write_text("# Model\n")
    (tmp_path / "release" / "config.json").write_text(json.dumps({"a": 1}))
    return ["push", str(tmp_path / "release"), "me/model"]


def test_a_dry_run_lists_and_sends_nothing(command: list[str], hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--licence", "mit", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("file            bytes\nREADME.md") and "\n  license: mit\n" in out
    assert hub.requests == []


def test_without_a_licence_one_line_says_what_to_write(
    command: list[str], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--yes"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and hub.requests == []
    assert (
        err == "tclip push: error: no licence: pass --licence ID, such as apache-2.0, mit, cc-by-4.0 or cc-by-nc-4.0\n"
    )


def test_yes_lists_and_sends(command: list[str], hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--licence", "mit", "--private", "--yes"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("file ") and out.endswith(f"\n{hub.address}/models/me/model/commit/1\n")
    assert hub.private == {"models/me/model": True} and set(hub.commits[0]) == {"README.md", "config.json"}


def test_it_asks_first(
    command: list[str], hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command += ["--licence", "mit"]
    assert main(command) == 2
    assert capsys.readouterr().err.endswith(
        "there is no terminal to ask on: pass --yes, or --dry-run to send nothing\n"
    )
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, code in (("n", 2), ("", 2), ("nay", 2), ("Y", 0)):
        asked: list[str] = []
        monkeypatch.setattr(
            "builtins.input", lambda question, answer=answer, asked=asked: asked.append(question) or answer
        )
        assert main(command) == code and asked == ["Push to me/model? [y/N] "]
        assert len(hub.commits) == (code == 0), answer
    assert capsys.readouterr().err == "tclip push: error: nothing was sent: the answer was not y\n" * 3


def test_what_is_private_is_refused_unless_it_is_named_as_public(
    command: list[str], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    pathlib.Path(command[1], "config.json").write_text('{"a": "gs://open-data/x"}')
    command += ["--licence", "mit", "--yes"]
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == "" and hub.requests == [] and err.count("\n") == 1
    assert err.startswith("tclip push: error: private: config.json, line 1: a bucket, gs://open-data/x. Remove it, or")
    assert main([*command, "--public", "gs://open-data"]) == 0 and len(hub.commits) == 1


def test_errors_of_the_hub_are_one_line_and_code_2(
    command: list[str], hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command += ["--licence", "mit", "--yes"]
    hub.create("datasets/me/model")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    for reason in ("the hub does not accept the token", "is a dataset on the hub"):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert reason in err and err.count("\n") == 1 and err.startswith("tclip push: error: me/model")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
