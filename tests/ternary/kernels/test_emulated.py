"""The kernels of instruction sets that this CPU may lack, compiled with a small program and run under an emulator."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

from tclip_jax.ternary.kernels.native_cpu import LIBRARY

FLAGS = ("-O2", "-std=c++17", "-ffp-contract=off", "-Wno-psabi")
PROGRAM = pathlib.Path(__file__).parent / "native" / "check.cc"
NEON = ("aarch64-linux-gnu-g++", "-static")
# name -> compiler, emulator
TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "this CPU": (("c++",), ()),
    "neon": (NEON, ("qemu-aarch64",)),
    "neon, dot products": ((*NEON, "-march=armv8.2-a+dotprod"), ("qemu-aarch64", "-cpu", "max")),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_instruction_set_equals_the_portable_one(target: str, tmp_path: pathlib.Path) -> None:
    compiler, emulator = TARGETS[target]
    for program in (compiler[0], *emulator[:1]):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: apt-get install qemu-user g++-aarch64-linux-gnu)")
    build = [*compiler, *FLAGS, "-I", str(LIBRARY.parent), str(PROGRAM), "-o", str(tmp_path / "check")]
    subprocess.run(build, check=True)
    done = subprocess.run([*emulator, str(tmp_path / "check")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert names[-1] == "portable" and (target == "this CPU" or names[0] == "neon")
