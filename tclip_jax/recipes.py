"""Load recipes by name or path, override their keys from the command line, and point errors to the recipe's line."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import pathlib
import re
import traceback
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import ml_collections

from tclip_jax.registry import load_file
from tclip_jax.schema import check_keys, plain

if TYPE_CHECKING:
    from tclip_jax.runs.config import RunConfig

_PACKAGE = pathlib.Path(__file__).resolve().parent


def recipe_folder() -> pathlib.Path:
    """Return the folder of shipped recipes."""
    return shipped_folder("configs")


def shipped_folder(name: str) -> pathlib.Path:
    """Return a folder of the repository: inside the package in a wheel, next to it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def recipe_path(spec: str) -> pathlib.Path:
    """Return the file of a recipe, for the arguments and errors of `load_recipe`."""
    name = spec.partition(":")[0]
    if not name.endswith(".py"):
        folder = recipe_folder()
        check_keys([name], (path.stem for path in folder.glob("[!_]*.py")), f"the recipe folder {folder}")
        return folder / f"{name}.py"
    if not (path := pathlib.Path(name)).is_file():
        raise FileNotFoundError(f"{path}: no such recipe file")
    return path


def load_recipe(spec: str) -> ml_collections.ConfigDict:
    """Return the configuration of a recipe. The plug-ins that its file registers stay registered.

    Args:
      spec: `name[:argument]` for a shipped recipe, or `path.py[:argument]`; the recipe parses the argument.

    Raises:
      ValueError: no shipped recipe has that name (the message names the nearest), the file has no get_config, or it
        fails (the message has its line).
      FileNotFoundError: there is no file at that path.
    """
    path, argument = recipe_path(spec).resolve(), spec.partition(":")[2]
    try:
        module = load_file(path)
        if hasattr(module, "get_config"):
            return module.get_config(argument) if argument else module.get_config()
    except Exception as error:
        line = _line_that_failed(path, error)
        if line is None:
            raise
        raise ValueError(f"{recipe_path(spec)}:{line}: {_reason(error)}") from error
    raise ValueError(f"{path} is not a recipe: it must define get_config(argument)")


def resolve(spec: str, assignments: Sequence[str] = (), *, teacher_may_miss: bool = False) -> ml_collections.ConfigDict:
    """Load a recipe, override keys, and check the result by `run_config`.

    Args:
      spec: as in `load_recipe`.
      assignments: as in `override`.
      teacher_may_miss: accept losses that need a teacher without one, for commands that do not train.

    Raises:
      ValueError: the recipe, an assignment or a value is invalid; the message has the line of the recipe, if the recipe
        sets the value.
      FileNotFoundError: there is no such recipe file.
    """
    from tclip_jax.runs.config import run_config

    config = override(load_recipe(spec), assignments)
    checked = config.copy_and_resolve_references()
    if teacher_may_miss and not (config.get("teacher") or config.get("data", {}).get("teacher_cache")):
        checked.teacher = "any"
    try:
        run_config(checked)
    except ValueError as error:
        path, keys = recipe_path(spec), _keys_in(str(error))
        overridden = {assignment.partition("=")[0].split(".")[-1] for assignment in assignments}
        line = None if keys[-1:] and keys[-1] in overridden else _line_that_sets(path, keys)
        if line is None:
            raise
        raise ValueError(f"{path}:{line}: {error}") from error
    return config


def data_run(spec: str, assignments: Sequence[str] = ()) -> RunConfig:
    """Return the run of a recipe for commands that read its data alone: without a teacher cache, or perhaps a teacher.

    Args and errors are those of `resolve`.
    """
    from tclip_jax.runs.config import run_config

    config = resolve(spec, ["data.teacher_cache=", *assignments], teacher_may_miss=True)
    named = config.teacher
    config.teacher = named or "any"
    return dataclasses.replace(run_config(config), teacher=named)


def override(config: ml_collections.ConfigDict, assignments: Iterable[str]) -> ml_collections.ConfigDict:
    """Set keys of a configuration in place, and return it.

    Args:
      config: the configuration.
      assignments: `a.b=value` each; the value is a Python literal (2e-3, True, (1, 2)) or otherwise a string.

    Raises:
      ValueError: there is no such key (the message names the nearest), an assignment has no value, or it sets a section
        to a value or a key below a value.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--config.{plain(path)} has no value: write --config.{plain(path)}=VALUE")
        section, name = config, "config"
        *parents, leaf = path.split(".")
        for key in parents:
            _check_key(section, name, key)
            section, name = section[key], f"{name}.{key}"
            if not isinstance(section, ml_collections.ConfigDict):
                raise ValueError(f"{name} is a value, not a section: write --{name}=VALUE")
        # A model_cfg may omit keys of open_clip that have defaults, and plug-ins declare the options of a quantizer.
        if not path.startswith(("model.", "preprocess.", "quantizer.options.")):
            _check_key(section, name, leaf)
        try:
            value = ast.literal_eval(text)
        # TypeError: an unhashable element, as in {[1]}; the last two: a literal that is nested too deeply.
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            value = text
        if isinstance(section.get(leaf), ml_collections.ConfigDict) and not isinstance(value, dict):
            raise ValueError(f"config.{plain(path)} is a section, not a value: write --config.{path}.KEY=VALUE")
        # `run_config` checks types later; its errors name the key and the expected type.
        with section.unlocked(), section.ignore_type():
            try:
                section[leaf] = value
            except OverflowError:  # The integer is too large for a float.
                raise ValueError(f"config.{path} is a number of {len(text)} digits: it must be finite") from None
    return config


def _check_key(section: ml_collections.ConfigDict, name: str, key: str) -> None:
    """Raise ValueError unless a section of this name has the key. The error names the nearest, also one level below."""
    below = {
        leaf: f"{parent}.{leaf}"
        for parent, keys in reversed(section.items())  # of two sections the first counts
        if isinstance(keys, ml_collections.ConfigDict)
        for leaf in keys
    }
    near = difflib.get_close_matches(key, [*section, *below], 1)
    if key not in section and near and near[0] not in section:
        raise ValueError(f"{name} has no {key!r:.80}: the nearest is {below[near[0]]!r}")
    check_keys([key], section, name)


def _line_that_failed(path: pathlib.Path, error: Exception) -> int | None:
    """Return the line of a recipe where an error arose; None if the recipe raises it, as for a wrong argument."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ValueError) and frames[-1].filename == str(path):
        return None
    return next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), None)


def _reason(error: Exception) -> str:
    """Describe the error of a recipe in one line."""
    text = " ".join(str(error).split())
    if match := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text):  # of ml_collections
        return f"the configuration has no {match[2]!r}: the nearest is {match[1]!r}"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _keys_in(message: str) -> list[str]:
    """Return the path of the key that an error of `run_config` is about, such as ["optimizer", "learning_rate"]."""
    match = re.match(r"([\w.]+)(?:\[\d+\])?(?: has no '(\w+)')?", message)
    return [] if match is None else [*match[1].removeprefix("config.").split("."), *filter(None, [match[2]])]


def _line_that_sets(path: pathlib.Path, keys: Sequence[str]) -> int | None:
    """Return the last line of a recipe that sets a key: by attribute, by index, by keyword, or in a dict."""
    if not keys:
        return None
    found: dict[bool, int] = {}  # whether the section is named too -> line
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names = [ast.unparse(node.value).split(".")[-1], node.attr]
        elif isinstance(node, ast.keyword) and node.arg:
            names = ["", node.arg]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = ["", node.value]
        else:
            continue
        if names[-1] == keys[-1]:
            whole = names[-2] == (keys[-2] if len(keys) > 1 else "config")
            found[whole] = max(found.get(whole, 0), node.lineno)
    return found.get(True, found.get(False))
