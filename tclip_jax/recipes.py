"""Load recipes by name or path, and override their keys from the command line."""

from __future__ import annotations

import ast
import importlib.util
import pathlib
from collections.abc import Iterable

import ml_collections

from tclip_jax.schema import check_keys, plain

_PACKAGE = pathlib.Path(__file__).resolve().parent


def recipe_folder() -> pathlib.Path:
    """Return the folder of shipped recipes."""
    return shipped_folder("configs")


def shipped_folder(name: str) -> pathlib.Path:
    """Return a folder of the repository: inside the package in a wheel, next to it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def load_recipe(spec: str) -> ml_collections.ConfigDict:
    """Return the configuration of a recipe.

    Args:
      spec: `name[:argument]` for a shipped recipe, or `path.py[:argument]`; the recipe parses the argument.

    Raises:
      ValueError: no shipped recipe has that name (the message names the nearest), or the file has no get_config.
      FileNotFoundError: there is no file at that path.
    """
    name, _, argument = spec.partition(":")
    if name.endswith(".py"):
        path = pathlib.Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such recipe file")
    else:
        check_keys(
            [name], (path.stem for path in recipe_folder().glob("[!_]*.py")), f"the recipe folder {recipe_folder()}"
        )
        path = recipe_folder() / f"{name}.py"
    module_spec = importlib.util.spec_from_file_location(f"tclip_recipe_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None, path
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} is not a recipe: it must define get_config(argument)")
    return module.get_config(argument) if argument else module.get_config()


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
            check_keys([key], section, name)
            section, name = section[key], f"{name}.{key}"
            if not isinstance(section, ml_collections.ConfigDict):
                raise ValueError(f"{name} is a value, not a section: write --{name}=VALUE")
        # A model_cfg may omit keys of open_clip that have defaults, so these keys may be new.
        if not path.startswith(("model.", "preprocess.")):
            check_keys([leaf], section, name)
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
