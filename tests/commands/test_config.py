"""tclip config: values, defaults, types and bounds of a recipe, from the declarations."""

from __future__ import annotations

import json
import pathlib

import pytest

from tclip_jax.cli import main
from tclip_jax.recipes import load_recipe
from tclip_jax.runs.config import base_config
from tclip_jax.runs.reference import key_references, values_by_path


def test_every_key_of_the_configuration_has_a_reference_with_its_default_and_meaning() -> None:
    references = {key.path: key for key in key_references()}
    values = values_by_path(base_config().to_dict())
    assert set(values) <= set(references)
    assert all(key.doc and key.type for key in references.values() if key.path != "loss.task_kind")
    for path, value in values.items():
        assert references[path].default == value, path


def test_a_recipe_is_printed_with_its_changes_marked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "quickstart:student", "optimizer", "steps", "--config.optimizer.learning_rate=2e-3"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:2] == ["key", "value"]
    rows = {line[1] if line[0] == "*" else line[0]: line for line in lines[1:]}
    assert rows["steps"][:5] == ["*", "steps", "500", "int,", "at"]
    assert rows["optimizer.learning_rate"][:3] == ["*", "optimizer.learning_rate", "0.002"]
    assert rows["optimizer.b1"][:2] == ["optimizer.b1", "0.9"]
    assert all(path == "steps" or path.startswith("optimizer.") for path in rows)


def test_changed_keys_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "quickstart:student", "--changed", "--json"]) == 0
    changed = json.loads(capsys.readouterr().out)
    assert changed["steps"] == 500 and changed["loss.crd"] == 1.0 and "seed" not in changed
    assert main(["config", "quickstart:student", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    expected = json.loads(json.dumps(values_by_path(load_recipe("quickstart:student").to_dict())))
    assert {path: values[path] for path in expected} == expected


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "quickstart:student", "optimiser"]) == 2
    assert "the configuration has no 'optimiser': the nearest is 'optimizer'" in capsys.readouterr().err


RECIPE = """from tclip_jax.recipes import load_recipe


def get_config(case=""):
    config = load_recipe("quickstart:teacher")
    if case == "section":
        config.optimzer.learning_rate = 1e-3
    if case == "key":
        config.optimizer.learning_rat = 1e-3
    if case == "update":
        config.data.update({
            "batch_size": -1,
        })
    if case == "model":
        config.model.vision_cfg.width = "wide"
    if case == "name":
        config.seed = undefined
    if case == "contradiction":
        config.optimizer.warmup_steps = 5000
    if case == "index":
        config["steps"] = 0
    if case == "keyword":
        config.loss.update(crd=-1.0)
    if case == "refused":
        raise ValueError("write mine:small")
    return config
"""


@pytest.mark.parametrize(
    ("case", "line", "message"),
    [
        ("section", 7, "the configuration has no 'optimzer': the nearest is 'optimizer'"),
        ("key", 9, "config.optimizer has no 'learning_rat': the nearest is 'learning_rate'"),
        ("update", 12, "config.data.batch_size is -1: it must be at least 1"),
        ("model", 15, "vision_cfg.width is 'wide': it must be int"),
        ("name", 17, "NameError: name 'undefined' is not defined"),
        ("contradiction", 19, "config.optimizer.warmup_steps 5000 is not below config.steps 400"),
        ("index", 21, "config.steps is 0: it must be at least 1"),
        ("keyword", 23, "config.loss.crd is -1.0: it must be at least 0"),
    ],
)
def test_errors_point_to_the_line_of_the_recipe(
    case: str, line: int, message: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(RECIPE)
    assert main(["config", f"{path}:{case}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tclip config: error: {path}:{line}: {message}") and error.count("\n") == 1


def test_an_override_is_not_blamed_on_the_recipe(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.py"
    path.write_text(RECIPE)
    assert main(["config", f"{path}:index", "--config.steps=-1"]) == 2
    assert capsys.readouterr().err.startswith("tclip config: error: config.steps is -1")
    assert main(["config", f"{path}:refused"]) == 2
    assert capsys.readouterr().err == "tclip config: error: write mine:small\n"
    path.write_text("def get_config(:\n")
    assert main(["config", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"tclip config: error: {path}:1: SyntaxError")
