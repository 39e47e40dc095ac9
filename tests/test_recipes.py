"""Recipes by name and by path, and overrides of their keys."""

from __future__ import annotations

import pathlib
from typing import Any

import ml_collections
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tclip_jax import recipes
from tclip_jax.recipes import data_run, load_recipe, override, recipe_folder
from tclip_jax.runs.config import base_config, run_config

RECIPES = sorted(path.stem for path in recipe_folder().glob("[!_]*.py"))


def test_commands_that_read_data_alone_keep_the_teacher_of_a_recipe() -> None:
    assert data_run("quickstart:student").teacher == ""
    assert data_run("quickstart:student", ["teacher=runs/teacher"]).teacher == "runs/teacher"


def test_recipes_of_the_checkout_are_found() -> None:
    assert recipe_folder() == pathlib.Path(__file__).resolve().parents[1] / "configs"
    assert "quickstart" in RECIPES


def test_recipes_inside_an_installed_package_come_first(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package" / "configs").mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(recipes, "_PACKAGE", tmp_path / "package")
    assert recipe_folder() == tmp_path / "package" / "configs"


@pytest.mark.parametrize("who", ["teacher", "student"])
@pytest.mark.parametrize("mode", ["", ",runlocal"])
def test_quickstart_is_a_valid_run(who: str, mode: str) -> None:
    config = load_recipe(f"quickstart:{who}{mode}")
    run = run_config(override(config, ["teacher=runs/teacher"] if who == "student" else []))
    assert bool(run.rules) == ("crd" in run.loss.weights) == (who == "student")
    assert run.steps == (4 if mode else {"teacher": 400, "student": 500}[who])
    assert run.data.source == run.eval.source == "digits"


def test_without_an_argument_get_config_uses_its_default() -> None:
    assert load_recipe("quickstart") == load_recipe("quickstart:teacher")


@pytest.mark.parametrize("argument", ["pupil", "teacher,fast", ",runlocal"])
def test_quickstart_lists_its_arguments(argument: str) -> None:
    with pytest.raises(ValueError, match=rf"^quickstart:{argument}: write quickstart:teacher or quickstart:student"):
        load_recipe(f"quickstart:{argument}")


def test_a_recipe_by_its_path(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from tclip_jax.runs.config import base_config\n"
        "def get_config(arg='7'):\n"
        "    config = base_config()\n"
        "    config.steps = int(arg)\n"
        "    return config\n"
    )
    assert load_recipe(str(path)).steps == 7 and load_recipe(f"{path}:9").steps == 9


def test_unknown_recipes_are_errors(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        ValueError, match=r"^the recipe folder .*configs has no 'quikstart': the nearest is 'quickstart'$"
    ):
        load_recipe("quikstart:teacher")
    with pytest.raises(FileNotFoundError, match=r"absent\.py: no such recipe file"):
        load_recipe(str(tmp_path / "absent.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=r"empty\.py is not a recipe: it must define get_config\(argument\)"):
        load_recipe(str(tmp_path / "empty.py"))


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("steps=7", 7),
        ("optimizer.learning_rate=2e-3", 2e-3),
        ("optimizer.learning_rate=1", 1.0),
        ("mesh.data=-1", -1),
        ("remat=True", True),
        ("teacher=runs/a=b", "runs/a=b"),
        ("teacher=", ""),
        ("teacher={[1]}", "{[1]}"),
        ("data.source=folder:/data/my photos", "folder:/data/my photos"),
        ("data.templates=('a {c}', 'the {c}')", ("a {c}", "the {c}")),
        ("quantizer.group=channel", "channel"),
        ("model.vision_cfg.width=96", 96),
        ("model.vision_cfg.pool_type=avg", "avg"),
        ("preprocess.size=(32, 32)", (32, 32)),
        ("ternary=[('image/.*', {'factor': 1.0})]", [("image/.*", {"factor": 1.0})]),
    ],
)
def test_an_override_is_a_literal_or_a_string(assignment: str, value: Any) -> None:
    config = override(base_config(), [assignment])
    for key in assignment.partition("=")[0].split("."):
        config = config[key]
    assert config == value and type(config) is type(value)


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none() | st.text())
def test_any_literal_can_be_a_value(value: Any) -> None:
    assert override(base_config(), [f"teacher={value!r}"]).teacher == value


def test_the_last_override_wins_and_run_config_checks_types() -> None:
    config = override(base_config(), ["steps=3", "steps=5", "data.batch_size=many"])
    assert config.steps == 5
    with pytest.raises(ValueError, match=r"config\.data\.batch_size is 'many': it must be int"):
        run_config(config)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stepz=3", r"^config has no 'stepz': the nearest is 'steps'$"),
        ("learning_rate=3", r"^config has no 'learning_rate': the nearest is 'optimizer\.learning_rate'$"),
        ("optimiser.b1=3", r"^config has no 'optimiser': the nearest is 'optimizer'$"),
        ("data.batchsize=3", r"^config\.data has no 'batchsize': the nearest is 'batch_size'$"),
        ("model.vison_cfg.width=3", r"^config\.model has no 'vison_cfg': the nearest is 'vision_cfg'$"),
        ("steps", r"^--config\.steps has no value: write --config\.steps=VALUE$"),
        ("steps.more=3", r"^config\.steps is a value, not a section: write --config\.steps=VALUE$"),
        ("data=3", r"^config\.data is a section, not a value: write --config\.data\.KEY=VALUE$"),
        ("model.text_cfg=None", r"^config\.model\.text_cfg is a section, not a value"),
    ],
)
def test_an_invalid_override_names_the_fix(assignment: str, message: str) -> None:
    config = base_config()
    with pytest.raises(ValueError, match=message):
        override(config, [assignment])
    assert config == base_config()


def test_a_locked_recipe_can_be_overridden() -> None:
    config = ml_collections.ConfigDict({"steps": 1}).lock()
    assert override(config, ["steps=two"]).steps == "two" and config.is_locked


def test_a_number_too_large_for_a_float_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^config.loss.task is a number of 400 digits: it must be finite$"):
        override(base_config(), ["loss.task=" + "9" * 400])


@pytest.mark.parametrize(
    "text", ["(" * 5000, "-" * 50_000 + "1", "[" * 300 + "]" * 300, "{[1]}", "9" * 5000, "\0", "1e999)"]
)
def test_a_value_that_python_cannot_parse_is_a_string(text: str) -> None:
    """Found by tests/fuzz: deeply nested literals raised RecursionError and MemoryError."""
    config = override(load_recipe("quickstart"), [f"data.source={text}"])
    assert config.data.source == text or text[0] == "["


@pytest.mark.parametrize("assignment", ["\x1b[2J", "data.\x1b[2J\n=3", "x\u2028y=1", "data=\x1b"])
def test_keys_that_cannot_be_printed_are_quoted(assignment: str) -> None:
    with pytest.raises(ValueError) as raised:
        override(load_recipe("quickstart"), [assignment])
    assert str(raised.value).isprintable()
