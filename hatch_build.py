"""Compiles the native CPU kernel when the package is built or installed; without a C++ compiler, leaves it out."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import sysconfig
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = pathlib.Path("tclip_jax/ternary/native")
# No contraction: all instruction sets then give the same bits. No -march: the kernel chooses when it is called.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-psabi")


class NativeKernel(BuildHookInterface[Any]):
    """Beside its source in an editable installation, and within a wheel of this platform otherwise."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        folder = pathlib.Path(self.root) / FOLDER
        library = folder / "libternary_cpu.so"
        library.unlink(missing_ok=True)
        jaxlib = importlib.util.find_spec("jaxlib")
        if jaxlib is None or jaxlib.origin is None:
            self.app.display_warning("jaxlib is not there, whose headers the native CPU kernel needs: left out")
            return
        include = pathlib.Path(jaxlib.origin).parent / "include"
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        command = [*compiler, *FLAGS, "-isystem", str(include), "-o", str(library), str(folder / "ternary_cpu.cc")]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            self.app.display_warning(f"the native CPU kernel is left out, XLA serves instead: {lines[0]}")
            return
        build_data["artifacts"].append(str(FOLDER / library.name))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"


def _platform_tag() -> str:
    if sys.platform == "darwin":
        return f"macosx_{platform.mac_ver()[0].split('.')[0]}_0_{platform.machine()}"
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
