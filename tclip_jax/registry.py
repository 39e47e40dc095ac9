"""Registries: named entries of the package, and of plug-ins, which are Python files or installed packages.

A plug-in registers its entries when it is imported. A recipe is imported when it is loaded. At the first look into a
registry, also in worker processes, these are imported: the files and modules that the environment variable
TCLIP_PLUGINS names, and the modules that installed packages name in an entry point, a line `any_name = "its.module"`
below `[project.entry-points."tclip_jax.plugins"]`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
ENTRY_POINTS = "tclip_jax.plugins"
PLUGINS = "TCLIP_PLUGINS"  # files and modules, separated as in PATH

_files: set[pathlib.Path] = set()  # that registered an entry


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to entries, to which plug-ins add theirs.

    Args:
      what: what an entry is, for errors, such as "quantizer".
      entries: the entries of the package, unless `extend` adds them.
    """

    def __init__(self, what: str, entries: Mapping[str, T] | None = None) -> None:
        self._what, self._entries = what, dict(entries or {})
        self._files: dict[str, pathlib.Path] = {}  # of the plug-ins' entries

    def extend(self, entries: Mapping[str, T]) -> None:
        """Add entries of the package itself."""
        self._entries.update(entries)

    def add(self, name: str, entry: T, made_by: Any) -> None:
        """Add the entry of a plug-in. The same file may add a name again, as when a recipe is loaded twice.

        Args:
          name: a Python identifier, because it becomes the key or the value of a configuration.
          entry: the entry.
          made_by: the function or class that the entry calls; its source file identifies the plug-in.

        Raises:
          ValueError: the name is not an identifier, or it is that of the package or of another plug-in.
        """
        if not name.isidentifier():
            raise ValueError(f"{self._what} {name!r}: the name must be a Python identifier")
        file = _source_file(made_by)
        if name in self._entries and self._files.get(name) != file:
            owner = self._files.get(name, "tclip_jax")
            raise ValueError(f"{file}: the {self._what} {name!r} is already registered by {owner}: choose another name")
        self._entries[name], self._files[name] = entry, file
        _files.add(file)

    def find(self, name: str, where: str) -> T:
        """Return an entry.

        Raises:
          ValueError: no entry has this name; the error starts with `where` and lists the names.
        """
        if name not in self:
            names = ", ".join(map(repr, self))
            raise ValueError(f"{where} is {name!r:.80}: it must be one of {names}, or be registered by a plug-in")
        return self._entries[name]

    def plugin(self, name: str) -> dict[str, str]:
        """Return the file name of a plug-in's entry and the file's SHA-256; {} for an entry of the package.

        The code of a notebook or of standard input has no file, and "" for its SHA-256.
        """
        if name not in self._files:
            return {}
        file = self._files[name]
        return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""}

    def __getitem__(self, name: str) -> T:
        load_installed()
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        load_installed()
        return iter(self._entries)

    def __len__(self) -> int:
        load_installed()
        return len(self._entries)


@functools.cache
def load_installed() -> None:
    """Import the plug-ins of installed packages and those that TCLIP_PLUGINS names, once.

    Raises:
      ValueError: one cannot be imported; the error names it.
    """
    for point in sorted(importlib.metadata.entry_points(group=ENTRY_POINTS)):
        try:
            point.load()
        except Exception as error:
            package = point.dist.name if point.dist else "a package"
            raise ValueError(
                f"the plug-in {point.name!r} of {package} cannot be imported ({type(error).__name__}: {error}):"
                f" mend or uninstall {package}"
            ) from error
    for plugin in filter(None, os.environ.get(PLUGINS, "").split(os.pathsep)):
        try:
            load_plugin(plugin)
        except FileNotFoundError:
            raise FileNotFoundError(f"{plugin}, which {PLUGINS} names: no such file") from None


def load_plugin(plugin: str) -> None:
    """Import a plug-in, in this process and in the processes that it starts.

    Args:
      plugin: the path of a Python file, or the name of a module.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it has no name, or it cannot be imported.
    """
    if not plugin:
        raise ValueError("--plugin has no value: name a Python file or a module")
    try:
        if plugin.endswith(".py"):
            load_file(pathlib.Path(plugin))
            return
        importlib.import_module(plugin)
        _pass_on(plugin)
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not pathlib.Path(plugin).is_file():
            raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [str(frame.lineno) for frame in frames if frame.filename == str(pathlib.Path(plugin).resolve())]
        line = f":{lines[-1]}" if lines else ""
        raise ValueError(f"the plug-in {plugin}{line} cannot be imported: {type(error).__name__}: {error}") from error


def load_file(path: pathlib.Path) -> ModuleType:
    """Import a Python file by its path; again if it was imported before. Raises the errors of the file.

    If the file registers an entry, worker processes import it too, and get its objects by value.

    Raises:
      FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    path = path.resolve()
    spec = importlib.util.spec_from_file_location(f"tclip_file_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # the file of a class is found by its module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    if path in _files:
        import cloudpickle

        cloudpickle.register_pickle_by_value(module)  # Grain's workers cannot import it by its name
        _pass_on(str(path))
    return module


def _pass_on(plugin: str) -> None:
    plugins = [*filter(None, os.environ.get(PLUGINS, "").split(os.pathsep))]
    os.environ[PLUGINS] = os.pathsep.join(dict.fromkeys([*plugins, plugin]))


def _source_file(made_by: Any) -> pathlib.Path:
    while isinstance(made_by, functools.partial):
        made_by = made_by.func
    made_by = inspect.unwrap(made_by)
    try:
        return pathlib.Path(inspect.getfile(made_by)).resolve()
    except (TypeError, OSError):  # a class of a notebook, or an instance
        return pathlib.Path(type(made_by).__module__)
