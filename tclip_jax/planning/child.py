"""Asks a process of its own to compile, and keeps what it answered."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

import ml_collections
import tqdm
from etils import epath
from packaging import requirements

from tclip_jax.keys import Recipe, difference, digest, recipe
from tclip_jax.planning.estimate import StepFacts
from tclip_jax.planning.teachers import find_teacher
from tclip_jax.runs.config import run_config
from tclip_jax.storage import write_atomic

_logger = logging.getLogger(__name__)
_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "libtpu", "numpy", "ml_collections")
_PREFIXES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "TCLIP_IMPLEMENTATION")  # of variables that decide what is compiled
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}

_logger = logging.getLogger(__name__)


def compiled_facts(
    config: Mapping[str, Any], topology: str, teacher_preset: str, cache: epath.PathLike | None
) -> StepFacts:
    """As `compile_for`, in another process; read from `cache` if the same was asked before of the same code.

    A file there says what made it: configuration, topology, teacher, code, libraries and what the environment tells JAX
    and libtpu.

    Raises:
      ValueError: what is wrong with the configuration; libtpu is missing, or failed.
    """
    request = {"config": dict(config), "topology": topology, "teacher_preset": teacher_preset}
    if not cache:
        return _ask(request)
    made_by = _made_by(request)
    path = epath.Path(cache) / f"{digest(made_by)}.json"
    if path.exists() and (found := _read(path, made_by)):
        return found
    facts = _ask(request)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"made_by": made_by, "facts": facts.to_json()}) + "\n")
    return facts


def _read(path: epath.Path, made_by: Recipe) -> StepFacts | None:
    """What was compiled before; None, and a line in the log, of a broken file or one that something else made."""
    try:
        kept = json.loads(path.read_text())
        if differs := difference(kept["made_by"], made_by):
            raise ValueError(f"made by something else ({differs})")
        return StepFacts.from_json(kept["facts"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _logger.warning("%s is no whole plan (%s: %s): it is compiled again", path, type(error).__name__, error)
        return None


def _ask(request: Mapping[str, Any]) -> StepFacts:
    if not importlib.util.find_spec("libtpu"):
        raise ValueError("libtpu is not installed, which compiles for TPUs: pip install 'tclip-jax[plan]'")
    if other := other_libtpu():
        _logger.warning("%s", other)
    command = [sys.executable, "-m", "tclip_jax.planning.compile"]
    with tempfile.TemporaryFile("w+") as errors:  # libtpu writes much there
        process = subprocess.Popen(
            command,
            env=os.environ | _ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        done = threading.Event()
        line = threading.Thread(target=_show_progress, args=(request["topology"], done))
        line.start()
        try:
            output, _ = process.communicate(json.dumps(request))
        finally:
            done.set()
            line.join()
            process.kill()
        answers = [each.removeprefix("answer ") for each in output.splitlines() if each.startswith("answer ")]
        if process.returncode or not answers:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no word of why"])[-1]
            why = f"{last} ({other})" if (other := other_libtpu()) else last
            raise ValueError(f"compiling for {request['topology']} ended with exit code {process.returncode}: {why}")
    answer = json.loads(answers[-1])
    if "error" in answer:
        raise ValueError(answer["error"])
    return StepFacts.from_json(answer["facts"])


def other_libtpu() -> str:
    """Says that the installed libtpu is not the one of jax, whose jaxlib may not read its programs; "" if it is."""
    try:
        jax_version, found = (importlib.metadata.version(name) for name in ("jax", "libtpu"))
    except importlib.metadata.PackageNotFoundError:
        return ""
    for pin in map(requirements.Requirement, importlib.metadata.requires("jax") or ()):
        if pin.name == "libtpu" and found not in pin.specifier:
            return f"libtpu is {found}, and jax {jax_version} goes with {pin.specifier}: pip install 'tclip-jax[plan]'"
    return ""


def _show_progress(topology: str, done: threading.Event) -> None:
    """A line with the time that compiling takes, on a terminal."""
    layout = "{desc} {elapsed}"
    with tqdm.tqdm(desc=f"compiling for {topology}", bar_format=layout, leave=False, disable=None) as bar:
        while not done.wait(1):
            bar.refresh()


def _made_by(request: Mapping[str, Any]) -> Recipe:
    """All that decides what is answered: the request, the teacher that it names, the code, libraries, environment.

    Raises:
      ValueError: a teacher whose shape is not known.
    """
    run = run_config(ml_collections.ConfigDict(dict(request["config"])))
    code = hashlib.blake2b(digest_size=16)
    for path in sorted(_PACKAGE.rglob("*.py")):
        code.update(f"{path.relative_to(_PACKAGE)}\n".encode() + path.read_bytes())
    environment = {name: value for name, value in (os.environ | _ENVIRONMENT).items() if name.startswith(_PREFIXES)}
    return recipe(
        request=request,
        # Of a path: what lies there, which may be another model by now.
        teacher=repr(find_teacher(run, request["teacher_preset"])),
        code=code.hexdigest(),
        python=platform.python_version(),
        versions={name: version for name in _LIBRARIES if (version := _version(name))},
        environment=environment,
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
