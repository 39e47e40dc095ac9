"""Compile a step in another process (`planning.compile`), and cache the result."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import platform
import re
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

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "libtpu", "numpy", "ml_collections")
_PREFIXES = (
    "JAX_",
    "XLA_",
    "LIBTPU_",
    "TPU_",
    "TCLIP_IMPLEMENTATION",
)  # of environment variables that change the compiled program
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}

_TOO_LARGE = re.compile(
    r"RESOURCE_EXHAUSTED: Ran out of memory on HBM.*\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)"
)

_logger = logging.getLogger(__name__)


class DoesNotFitError(ValueError):
    """The compiler finds no place for the arrays of a step, so that there is no program to measure."""


def compiled_facts(
    config: Mapping[str, Any], topology: str, teacher_preset: str, cache: epath.PathLike | None
) -> StepFacts:
    """Run `compile_for` in another process, or read its result from the cache.

    A cached result records its key: configuration, topology, teacher, code, library versions, and the environment
    variables of JAX and libtpu. A result with another key is compiled again.

    Args:
      config: fields of the configuration.
      topology: name of the topology, such as "v5e:16x16".
      teacher_preset: see `find_teacher`.
      cache: folder of cached results; None for no cache.

    Raises:
      DoesNotFitError: the compiler refuses the step, because it has no place for its arrays.
      ValueError: the configuration is invalid, or libtpu is missing or failed.
    """
    request = {"config": dict(config), "topology": topology, "teacher_preset": teacher_preset}
    if not cache:
        return _compile(request)
    made_by = _cache_key(request)
    path = epath.Path(cache) / f"{digest(made_by)}.json"
    if path.exists() and (cached := _read(path, made_by)):
        return cached
    facts = _compile(request)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"made_by": made_by, "facts": facts.to_json()}) + "\n")
    return facts


def _read(path: epath.Path, made_by: Recipe) -> StepFacts | None:
    """Read a cached result; log a warning and return None if the file is broken or has another key."""
    try:
        cached = json.loads(path.read_text())
        if changes := difference(cached["made_by"], made_by):
            raise ValueError(f"its key differs: {changes}")
        return StepFacts.from_json(cached["facts"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _logger.warning("%s is not a valid cached plan (%s: %s): compiling again", path, type(error).__name__, error)
        return None


def _compile(request: Mapping[str, Any]) -> StepFacts:
    """Send a request to a new process of `planning.compile`, and read its answer."""
    if not importlib.util.find_spec("libtpu"):
        raise ValueError("libtpu, the compiler for TPUs, is not installed: pip install 'tclip-jax[plan]'")
    if mismatch := libtpu_mismatch():
        raise ValueError(f"{mismatch}; jaxlib cannot read every program of another libtpu")
    command = [sys.executable, "-m", "tclip_jax.planning.compile"]
    with tempfile.TemporaryFile("w+") as errors:  # libtpu logs much to stderr
        process = subprocess.Popen(
            command,
            env=os.environ | _ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        done = threading.Event()
        progress = threading.Thread(target=_show_progress, args=(request["topology"], done))
        progress.start()
        try:
            output, _ = process.communicate(json.dumps(request))
        finally:
            done.set()
            progress.join()
            process.kill()
        answers = [line.removeprefix("answer ") for line in output.splitlines() if line.startswith("answer ")]
        if process.returncode or not answers:
            errors.seek(0)
            reason = (errors.read().strip().splitlines() or ["no error message"])[-1]
            if sizes := _TOO_LARGE.search(reason):
                raise DoesNotFitError(
                    f"does not fit {request['topology']}: the compiler needs {sizes[1]} GiB for temporaries, and"
                    f" {sizes[2]} GiB of HBM are available. config.remat, config.data.microbatches, and a smaller"
                    " config.data.batch_size reduce them"
                )
            raise ValueError(f"compiling for {request['topology']} ended with exit code {process.returncode}: {reason}")
    answer = json.loads(answers[-1])
    if "error" in answer:
        raise ValueError(answer["error"])
    return StepFacts.from_json(answer["facts"])


def libtpu_mismatch() -> str:
    """Return a message if the installed libtpu is not the version that jax pins, else "".

    jaxlib may fail to read programs of another libtpu.
    """
    try:
        jax_version, libtpu_version = (importlib.metadata.version(name) for name in ("jax", "libtpu"))
    except importlib.metadata.PackageNotFoundError:
        return ""
    for pin in map(requirements.Requirement, importlib.metadata.requires("jax") or ()):
        if pin.name == "libtpu" and libtpu_version not in pin.specifier:
            return (
                f"libtpu is {libtpu_version}, but jax {jax_version} needs {pin.specifier}:"
                " pip install 'tclip-jax[plan]'"
            )
    return ""


def _show_progress(topology: str, done: threading.Event) -> None:
    """Show the elapsed time until `done` is set, if stderr is a terminal; otherwise log a line."""
    layout = "{desc} {elapsed}"
    with tqdm.tqdm(desc=f"compiling for {topology}", bar_format=layout, leave=False, disable=None) as bar:
        if bar.disable:
            _logger.info("compiling for %s: minutes for a model of full size", topology)
        while not done.wait(1):
            bar.refresh()


def _cache_key(request: Mapping[str, Any]) -> Recipe:
    """Return everything that determines the result: request, teacher, code, library versions and environment.

    Raises:
      ValueError: the architecture of the teacher is unknown.
    """
    run = run_config(ml_collections.ConfigDict(dict(request["config"])))
    code = hashlib.blake2b(digest_size=16)
    for path in sorted(_PACKAGE.rglob("*.py")):
        code.update(f"{path.relative_to(_PACKAGE)}\n".encode() + path.read_bytes())
    environment = {name: value for name, value in (os.environ | _ENVIRONMENT).items() if name.startswith(_PREFIXES)}
    return recipe(
        request=request,
        # The architecture, since the model at a path may have changed.
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
