"""Registries: names of the package, of files, of modules and of installed packages."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from tclip_jax import registry
from tclip_jax.data.sources import SOURCES
from tclip_jax.losses.registry import LOSSES
from tclip_jax.registry import Registry, load_file, load_plugin
from tests.plugins import own_registries

GAP = """
from tclip_jax import plugins

@plugins.loss("gap", "the gap")
def gap(x):
    return 0.0
"""


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv(registry.PLUGINS, "")
    with own_registries():
        yield


def test_a_registry_is_a_mapping_whose_errors_list_the_names() -> None:
    colours = Registry("colour", {"red": 1})
    colours.extend({"green": 2})
    assert dict(colours) == {"red": 1, "green": 2} and len(colours) == 2 and "blue" not in colours
    assert colours.find("red", "config.colour") == 1 and colours.plugin("red") == {}
    with pytest.raises(ValueError, match=r"^config\.colour is 'blue': it must be one of 'red', 'green', or be "):
        colours.find("blue", "config.colour")


def test_a_name_belongs_to_one_file(tmp_path: pathlib.Path) -> None:
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text(GAP)
    load_file(tmp_path / "one.py")
    load_file(tmp_path / "one.py")  # as a recipe that is loaded twice
    assert LOSSES["gap"].doc == "the gap"
    assert LOSSES.plugin("gap")["file"] == "one.py" and len(LOSSES.plugin("gap")["sha256"]) == 64
    with pytest.raises(ValueError, match=r"two\.py: the loss 'gap' is already registered by .*one\.py"):
        load_file(tmp_path / "two.py")
    (tmp_path / "three.py").write_text(GAP.replace('"gap"', '"task"'))
    with pytest.raises(ValueError, match=r"three\.py: the loss 'task' is already registered by tclip_jax"):
        load_file(tmp_path / "three.py")
    (tmp_path / "four.py").write_text(GAP.replace('"gap"', '"a gap"'))
    with pytest.raises(ValueError, match="loss 'a gap': the name must be a Python identifier"):
        load_file(tmp_path / "four.py")


def test_a_changed_file_has_another_digest(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "one.py"
    path.write_text(GAP)
    load_file(path)
    before = LOSSES.plugin("gap")
    path.write_text(GAP + "# changed\n")
    assert LOSSES.plugin("gap") != before


def test_only_files_with_plug_ins_are_passed_on(tmp_path: pathlib.Path) -> None:
    (tmp_path / "plain.py").write_text("x = 1\n")
    (tmp_path / "one.py").write_text(GAP)
    assert load_file(tmp_path / "plain.py").x == 1 and os.environ[registry.PLUGINS] == ""
    load_plugin(str(tmp_path / "one.py"))
    load_plugin(str(tmp_path / "one.py"))
    assert os.environ[registry.PLUGINS] == str(tmp_path / "one.py")


def test_a_plug_in_that_cannot_be_imported_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.py: no such file"):
        load_plugin(str(tmp_path / "absent.py"))
    with pytest.raises(ValueError, match="the plug-in no_such_module cannot be imported: ModuleNotFoundError"):
        load_plugin("no_such_module")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=r"broken\.py:1 cannot be imported: ZeroDivisionError: division by zero"):
        load_plugin(str(tmp_path / "broken.py"))


def run_python(program: str, *, path: pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(path), str(pathlib.Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=900)


def test_an_installed_package_adds_its_entries(tmp_path: pathlib.Path) -> None:
    (tmp_path / "ideas.py").write_text(GAP)
    info = tmp_path / "ideas-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ideas\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tclip_jax.plugins]\nmine = ideas\n")
    program = (
        "from tclip_jax.runs.config import base_config, run_config\n"
        "config = base_config()\n"
        "config.loss.gap = 0.5\n"
        "print(run_config(config).plugins['loss gap']['file'])\n"
    )
    ran = run_python(program, path=tmp_path)
    assert ran.stdout == "ideas.py\n", ran.stderr
    (tmp_path / "ideas.py").write_text("import no_such_module\n")
    ran = run_python(program, path=tmp_path)
    assert "the plug-in 'mine' of ideas cannot be imported (ModuleNotFoundError" in ran.stderr
    assert "mend or uninstall ideas" in ran.stderr


def test_files_and_modules_of_the_environment_are_loaded(tmp_path: pathlib.Path) -> None:
    (tmp_path / "one.py").write_text(GAP)
    (tmp_path / "ideas.py").write_text(GAP.replace('"gap"', '"other"'))
    program = "from tclip_jax.losses.registry import LOSSES; print([*LOSSES][-2:])"
    both = os.pathsep.join([str(tmp_path / "one.py"), "ideas"])
    assert run_python(program, path=tmp_path, TCLIP_PLUGINS=both).stdout == "['gap', 'other']\n"


def test_a_class_of_a_file_is_known_by_its_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from tclip_jax import plugins\n\n@plugins.source('mine')\nclass Mine:\n    def __init__(self, *_): ...\n"
    )
    load_plugin(str(path))
    assert SOURCES.plugin("mine")["file"] == "mine.py" and os.environ[registry.PLUGINS] == str(path)
    path.write_text(path.read_text().replace("'mine'", "'digits'"))
    with pytest.raises(ValueError, match=r"mine\.py:3 cannot .* the data source 'digits' is already registered by tcl"):
        load_plugin(str(path))


def test_a_file_of_the_environment_that_is_missing_is_named(tmp_path: pathlib.Path) -> None:
    ran = run_python(
        "from tclip_jax.losses.registry import LOSSES; [*LOSSES]", path=tmp_path, TCLIP_PLUGINS="absent.py"
    )
    assert "absent.py, which TCLIP_PLUGINS names: no such file" in ran.stderr
