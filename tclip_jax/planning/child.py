"""Asks a process of its own to compile, and keeps what it answered."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

import tqdm
from etils import epath
from packaging import requirements

from tclip_jax.planning.program import StepFacts
from tclip_jax.storage import write_atomic

_logger = logging.getLogger(__name__)
_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}


def cache_folder() -> epath.Path:
    """Where plans are kept: below XDG_CACHE_HOME, by default ~/.cache."""
    return epath.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "tclip" / "plans"


def compiled_facts(
    config: Mapping[str, Any], topology: str, teacher_preset: str, cache: epath.PathLike | None
) -> StepFacts:
    """As `compile_for`, in another process; read from `cache` if the same was asked of the same code before.

    Raises:
      ValueError: what is wrong with the configuration; libtpu is missing, or failed.
    """
    request = {"config": dict(config), "topology": topology, "teacher_preset": teacher_preset}
    path = epath.Path(cache) / f"{_key(request)}.json" if cache else None
    if path and path.exists():
        try:
            return StepFacts.from_json(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _logger.warning("%s is no whole plan (%s): it is compiled again", path, error)
    facts = _ask(request)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(facts.to_json()) + "\n")
    return facts


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


def _key(request: Mapping[str, Any]) -> str:
    """Of a request, and of all that decides what is answered: the code, JAX and libtpu."""
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode())
    for name in ("jax", "jaxlib", "flax", "optax", "libtpu"):
        version = importlib.metadata.version(name) if importlib.util.find_spec(name) else ""
        digest.update(f"{name} {version}\n".encode())
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]
