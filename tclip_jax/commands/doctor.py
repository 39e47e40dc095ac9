"""Example:
  tclip doctor

Optional packages are imported, each in a process of its own, because an installed package may be unusable. A line that
starts with ! names a problem and its fix. The exit code is 0 if everything required is installed and works, 1 if not.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import tqdm

from tclip_jax.planning.child import libtpu_mismatch

PACKAGES = ("tclip-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")
# package -> (extra that installs it, purpose, statement that uses it)
OPTIONAL = {
    "torch": ("torch", "reads .bin and .pt weights, runs references of `tclip compare`", "import torch"),
    "open_clip_torch": ("torch", "runs references of `tclip compare`", "import open_clip"),
    "transformers": ("torch", "runs references of `tclip compare`", "import transformers.models.clip.modeling_clip"),
    "gcsfs": ("gcs", "reads and writes gs:// paths", "import gcsfs"),
    "s3fs": ("s3", "reads and writes s3:// paths", "import s3fs"),
    "gguf": ("gguf", "reads and writes GGUF files", "import gguf"),
    "flatbuffers": ("stablehlo", "writes StableHLO in `tclip export`", "import flatbuffers"),
    "onnx": ("onnx", "writes and reads ONNX files", "import onnx"),
    "onnxruntime": ("onnx", "verifies ONNX files and runs them in `tclip compare`", "import onnxruntime"),
    "litert-converter": ("litert", "writes LiteRT files", "import litert_converter.converter_api_ext"),
    "ai-edge-litert": (
        "litert",
        "verifies LiteRT files and runs them in `tclip compare`",
        "import ai_edge_litert.interpreter",
    ),
    "libtpu": ("plan", "compiles for TPUs in `tclip plan`", "import libtpu"),
}
_IMPORT_SECONDS = 120
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
      broken: whether an optional package is installed, but cannot be imported.
    """

    name: str
    value: str
    remedy: str = ""
    optional: bool = False
    broken: bool = False


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
    if backend == "cpu":
        yield _products()


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


def _products() -> Finding:
    from tclip_jax.ternary import default_activations
    from tclip_jax.ternary.kernels import native_cpu

    default = f"activations {default_activations()} by default"
    if best := native_cpu.best_instructions():
        return Finding("ternary products", f"native kernel with {best}; {default}")
    remedy = "with a C++17 compiler, install tclip_jax again"
    return Finding("ternary products", f"XLA: {native_cpu.NOT_BUILT}; {default}", remedy, optional=True)


def _optional() -> Iterator[Finding]:
    versions = {name: _version(name) for name in OPTIONAL}
    errors = import_errors({name: OPTIONAL[name][2] for name, version in versions.items() if version})
    for name, (extra, purpose, _) in OPTIONAL.items():
        version, error = versions[name], errors.get(name, "")
        if error:
            fix = f"pip install --force-reinstall 'tclip-jax[{extra}]'"
            if "torchvision" in error:
                fix = "torch and torchvision are of different builds: install both from one index"
            yield Finding(name, f"{version}, but it cannot be imported: {error}", fix, optional=True, broken=True)
        elif version:
            yield Finding(name, version, optional=True)
        else:
            yield Finding(name, "not installed", f"{purpose}: pip install 'tclip-jax[{extra}]'", optional=True)


def import_errors(statements: Mapping[str, str]) -> dict[str, str]:
    """Run each statement in a Python process of its own, all at once; return the last line of its error by name."""

    def error_of(statement: str) -> str:
        command = [sys.executable, "-c", statement]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_IMPORT_SECONDS)
        except subprocess.TimeoutExpired:
            return f"it takes more than {_IMPORT_SECONDS} s"
        lines = done.stderr.split("\n") if done.returncode else []
        return next(
            (line.strip() for line in reversed(lines) if line.strip()), f"exit code {done.returncode}" if lines else ""
        )

    with concurrent.futures.ThreadPoolExecutor() as pool:
        futures = {name: pool.submit(error_of, statement) for name, statement in statements.items()}
        bar = tqdm.tqdm(futures.items(), "imports", unit="package", disable=None, leave=False)
        return {name: error for name, future in bar if (error := future.result())}


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
        for name, value, remedy, optional, broken in findings:
            mark = "!" if broken or (remedy and not optional) else " "
            print(f"{mark} {name:{width}}  {value}" + (f"; {remedy}" if remedy else ""))
    return int(any(finding.remedy and not finding.optional for finding in findings))
