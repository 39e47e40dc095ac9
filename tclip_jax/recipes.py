"""Recipes by name or path, and overrides of their keys from the command line."""

from __future__ import annotations

import ast
import importlib.util
import pathlib
from collections.abc import Iterable

import ml_collections

from tclip_jax.schema import check_keys, plain

_PACKAGE = pathlib.Path(__file__).resolve().parent


def recipe_folder() -> pathlib.Path:
    """The folder of shipped recipes."""
    return shipped_folder("configs")


def shipped_folder(name: str) -> pathlib.Path:
    """A folder of the repository: inside the package when installed from a wheel, beside it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def load_recipe(spec: str) -> ml_collections.ConfigDict:
    """The configuration of `name[:argument]`, a shipped recipe, or of `path.py[:argument]`.

    Raises:
      ValueError: no recipe of that name, naming the nearest, or a file without get_config.
      FileNotFoundError: no file at that path.
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
        raise ValueError(f"{path} is no recipe: it defines no get_config(argument)")
    return module.get_config(argument) if argument else module.get_config()


def override(config: ml_collections.ConfigDict, assignments: Iterable[str]) -> ml_collections.ConfigDict:
    """Sets keys in place from `a.b=value`: a Python literal (2e-3, True, (1, 2)) or else a string.

    Raises:
      ValueError: no such key, with the nearest valid name, a value for a section or the reverse, or none.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--config.{plain(path)} has no value: write --config.{plain(path)}=VALUE")
        section, where = config, "config"
        *parents, leaf = path.split(".")
        for key in parents:
            check_keys([key], section, where)
            section, where = section[key], f"{where}.{key}"
            if not isinstance(section, ml_collections.ConfigDict):
                raise ValueError(f"{where} is a value, not a section: write --{where}=VALUE")
        # open_clip's own keys, with their defaults, may be left out of a model_cfg.
        if not path.startswith(("model.", "preprocess.")):
            check_keys([leaf], section, where)
        try:
            value = ast.literal_eval(text)
        # TypeError: of what cannot be hashed, as {[1]}; the last two: of a literal that is nested too deeply.
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            value = text
        if isinstance(section.get(leaf), ml_collections.ConfigDict) and not isinstance(value, dict):
            raise ValueError(f"config.{plain(path)} is a section, not a value: write --config.{path}.KEY=VALUE")
        # Types are checked by `run_config`, whose errors name the key and what would be right.
        with section.unlocked(), section.ignore_type():
            try:
                section[leaf] = value
            except OverflowError:  # an int that no float holds
                raise ValueError(f"config.{path} is a number of {len(text)} digits: it must be finite") from None
    return config
