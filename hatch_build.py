"""Compiles the native CPU kernel when the package is built or installed; without a C++ compiler, leaves it out.

The table of the hook in pyproject.toml has `source` and `library`, and `headers`, the package whose headers the source
needs, if it needs any. tclip_jax and the package of `tclip export --to torch` share this file.
"""

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

# No contraction: all instruction sets then give the same bits. No -march: the kernel chooses when it is called.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-Wno-psabi")


class NativeKernel(BuildHookInterface[Any]):
    """Beside its source in an editable installation, and within a wheel of this platform otherwise."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        library = pathlib.Path(self.root) / self.config["library"]
        library.unlink(missing_ok=True)
        command = [*shlex.split(os.environ.get("CXX", "c++")), *FLAGS, "-o", str(library)]
        if headers := self.config.get("headers"):
            package = importlib.util.find_spec(headers)
            if package is None or package.origin is None:
                self.app.display_warning(f"{headers} is not there, whose headers the native CPU kernel needs: left out")
                return
            command += ["-isystem", str(pathlib.Path(package.origin).parent / "include")]
        try:
            source = str(pathlib.Path(self.root) / self.config["source"])
            subprocess.run([*command, source], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            self.app.display_warning(f"the native CPU kernel is left out, a slower product serves: {lines[0]}")
            return
        build_data["artifacts"].append(self.config["library"])
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"


def _platform_tag() -> str:
    if sys.platform == "darwin":
        return f"macosx_{platform.mac_ver()[0].split('.')[0]}_0_{platform.machine()}"
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
