"""The history of a run's starts: changes by step, without the changes of repeated steps."""

from __future__ import annotations

import json
import pathlib
import subprocess

import pytest

from tclip_jax import keys
from tclip_jax.runs import record
from tclip_jax.runs.record import changes, in_words, read_history, record_at, run_provenance, write_record


def test_changes_are_named_by_their_keys() -> None:
    old = {"steps": 8, "loss": {"crd": 1, "fd": 0.0}, "flag": True, "layers": [1, 2], "gone": 3}
    new = {"steps": 8.0, "loss": {"crd": 3.0, "fd": 0.0}, "flag": 1, "layers": [1], "new": 4}
    changed = changes(old, new)
    assert changed == {"loss.crd": [1, 3.0], "flag": [True, 1], "layers": [[1, 2], [1]]}
    assert in_words(changed) == "loss.crd 1 → 3.0, flag true → 1, layers [1, 2] → [1]"
    assert (
        in_words({"teacher": ["", "runs/a"]}) == 'teacher "" → runs/a' and in_words(changed, ("loss",)).count("→") == 1
    )
    assert changes(old, old) == {}


def test_history_has_the_configuration_of_every_step(tmp_path: pathlib.Path) -> None:
    def start(step: int, crd: int, changed: bool) -> None:
        write_record(tmp_path, {"config": {"crd": crd}}, step, {"crd": [0, crd]} if changed else {})

    start(0, 1, False)
    start(80, 1, False)  # unchanged: no line
    start(80, 3, True)
    start(120, 4, True)
    history = read_history(tmp_path)
    assert [(line["step"], line["config"]["crd"]) for line in history] == [(0, 1), (80, 3), (120, 4)]
    assert [record_at(history, step)["config"]["crd"] for step in (0, 1, 80, 81, 120, 121)] == [1, 1, 1, 3, 3, 4]
    assert json.loads((tmp_path / "config.json").read_text()) == {"crd": 4}

    # The run goes back to step 100: no remaining step was made after the change at 120.
    start(100, 3, False)
    assert [line["step"] for line in read_history(tmp_path)] == [0, 80]
    start(80, 5, True)  # the lines of repeated steps are replaced
    assert [(line["step"], line["config"]["crd"]) for line in read_history(tmp_path)] == [(0, 1), (80, 5)]
    start(0, 7, False)
    assert [(line["step"], line["changed"]) for line in read_history(tmp_path)] == [(0, {})]


def test_a_run_without_a_history_has_one_line_of_its_config(tmp_path: pathlib.Path) -> None:
    assert read_history(tmp_path) == []
    (tmp_path / "config.json").write_text('{"steps": 3}')
    assert read_history(tmp_path) == [{"step": 0, "changed": {}, "config": {"steps": 3}}]
    (tmp_path / "history.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"history\.jsonl: not JSON"):
        read_history(tmp_path)


def git(folder: pathlib.Path, *words: str) -> str:
    options = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", *options, "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit_file(folder: pathlib.Path) -> str:
    """Make `folder` a checkout with one file, and return its commit."""
    git(folder, "init", "-q")
    (folder / "file").write_text("a")
    git(folder, "add", "file")
    git(folder, "commit", "-q", "-m", "first")
    return git(folder, "rev-parse", "HEAD")


def test_only_the_root_of_a_checkout_has_a_commit(tmp_path: pathlib.Path) -> None:
    (tmp_path / "package").mkdir()
    assert record._git_commit(tmp_path) is None
    commit = commit_file(tmp_path)
    assert record._git_commit(tmp_path) == commit and record._git_commit(tmp_path / "package") is None
    (tmp_path / "file").write_text("b")
    assert record._git_commit(tmp_path) == f"{commit}-dirty"
    assert record.software()["tclip_jax"] and record.software()["jax"]


def test_the_checkout_of_the_recipe_is_recorded_beside_the_package(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path / "recipes")
    software = record.software.__wrapped__
    assert "working_tree" not in software()
    commit = commit_file(tmp_path)
    assert software()["working_tree"] == commit != software().get("commit")
    (tmp_path / "file").write_text("b")
    assert software()["working_tree"] == f"{commit}-dirty"
    monkeypatch.chdir(pathlib.Path(record.__file__).parent)
    assert "working_tree" not in software()


def test_the_provenance_names_configuration_data_teacher_and_software(tmp_path: pathlib.Path) -> None:
    config = {"teacher": "runs/teacher", "steps": 9, "data": {"source": "folder:a", "split": "train", "workers": 2}}
    made_by = {
        "data": {"source": "folder:a", "split": "train", "samples": 5, "content": "dd"},
        "teacher": {"source": "runs/teacher", "step": 4, "content": "tt"},
        "init": None,
        "software": {"tclip_jax": "1", "commit": "cc", "working_tree": "ww"},
    }
    write_record(tmp_path, {"config": config, **made_by}, 0, {})
    provenance = run_provenance(tmp_path, 9)
    known = {name: part for name, part in made_by.items() if part}
    assert provenance == {"step": 9, "config": keys.digest(config), **known}
    write_record(tmp_path, {"config": {**config, "steps": 10}, **made_by}, 9, {"steps": [9, 10]})
    assert run_provenance(tmp_path, 9) == provenance
    later = run_provenance(tmp_path, 10)
    assert later["config"] == keys.digest({**config, "steps": 10}) and later["changed"] == {"9": {"steps": [9, 10]}}
