"""Example:
  tclip doctor

The exit code is 0 if everything required is installed and works, 1 if not. A line that starts with ! names a problem
and its fix.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from tclip_jax.planning.child import libtpu_mismatch

PACKAGES = ("tclip-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")
# package -> (extra that installs it, purpose)
OPTIONAL = {
    "torch": ("torch", "reads .bin and .pt weights, runs references of `tclip compare`"),
    "open_clip_torch": ("torch", "runs references of `tclip compare`"),
    "transformers": ("torch", "runs references of `tclip compare`"),
    "gguf": ("gguf", "reads and writes GGUF files"),
    "libtpu": ("plan", "compiles for TPUs in `tclip plan`"),
}
# device file of an accelerator -> extra that installs a JAX for it
_DEVICE_FILES = {"/dev/nvidia0": "cuda", "/dev/accel0": "tpu", "/dev/vfio/0": "tpu"}
_GIB = 2**30


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
      name: what was examined.
      value: its version or state.
      remedy: how to fix it; "" if nothing is wrong.
      optional: whether the program also works without the remedy.
    """

    name: str
    value: str
    remedy: str = ""
    optional: bool = False


def examine() -> list[Finding]:
    """Examine the installation. This starts JAX's backend, but runs no computation."""
    return [*_versions(), *_devices(), _precision(), *_optional()]


def _versions() -> Iterator[Finding]:
    yield Finding("python", platform.python_version())
    for name in PACKAGES:
        version = _version(name)
        yield Finding(name, version or "missing", "" if version else "pip install tclip-jax")
    if _older(_version("flax"), (0, 12, 9)) and not _older(_version("jax"), (0, 11, 1)):
        yield Finding(
            "flax and jax", "are incompatible", "flax 0.12.8 fails with jax 0.11.1 and later: pip install -U flax"
        )
    if mismatch := libtpu_mismatch():
        yield Finding("libtpu and jax", "are incompatible", mismatch)


def _devices() -> Iterator[Finding]:
    try:
        backend, devices = jax.default_backend(), jax.devices()
    except RuntimeError as error:  # An installed plugin cannot start.
        yield Finding("devices", "none", str(error).partition("\n")[0])
        return
    kinds = ", ".join(sorted({device.device_kind for device in devices}))
    yield Finding("devices", f"{len(devices)} x {kinds} ({backend})", _unused_accelerator(backend))
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        yield Finding("memory of a device", f"{limit / _GIB:.1f} GiB")
    # os.cpu_count also counts cores that this process may not use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("host", f"{cores} cores, {_host_memory()}")


def _unused_accelerator(backend: str) -> str:
    if backend != "cpu":
        return ""
    for file, extra in _DEVICE_FILES.items():
        if pathlib.Path(file).exists():
            forced = os.environ.get("JAX_PLATFORMS")
            return f"{file} exists: " + (
                f"unset JAX_PLATFORMS={forced}" if forced else f"pip install 'tclip-jax[{extra}]'"
            )
    return ""


def _precision() -> Finding:
    chosen: Any = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    default = "bfloat16 on a TPU, TF32 on a GPU that has it, float32 on a CPU; comparisons set `highest` themselves"
    return Finding("matmul of float32", str(chosen or default))


def _optional() -> Iterator[Finding]:
    for name, (extra, purpose) in OPTIONAL.items():
        version = _version(name)
        remedy = "" if version else f"{purpose}: pip install 'tclip-jax[{extra}]'"
        yield Finding(name, version or "not installed", remedy, optional=True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _older(version: str | None, than: tuple[int, ...]) -> bool:
    return version is not None and tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < than


def _host_memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / _GIB:.1f} GiB"
    except (ValueError, OSError, AttributeError):  # Not every system reports it.
        return "memory unknown"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the form of the report."""
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the report, with a mark before each line that needs a fix."""
    findings = examine()
    if args.json:
        print(json.dumps([finding._asdict() for finding in findings]))
    else:
        width = max(len(finding.name) for finding in findings)
        for name, value, remedy, optional in findings:
            mark = "!" if remedy and not optional else " "
            print(f"{mark} {name:{width}}  {value}" + (f"; {remedy}" if remedy else ""))
    return int(any(finding.remedy and not finding.optional for finding in findings))
