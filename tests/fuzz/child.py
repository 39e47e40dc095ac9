"""One reader against hostile files: python tests/fuzz/child.py READER SEED COUNT; `test_fuzz.py` starts it.

A process of its own, so that its memory can be limited, and so that what ends it or never returns is found too.
"""

from __future__ import annotations

import faulthandler
import functools
import os
import pathlib
import resource
import shutil
import signal
import sys
import tempfile
from typing import Any

import hypothesis
import hypothesis.strategies as st
from mutations import BYTE_CHANGES, DOCUMENT_CHANGES, change_bytes, change_document
from readers import READERS, Reader

from tclip_jax.artifacts import manifest
from tclip_jax.data.sources import remote
from tclip_jax.interop import checkpoints, gguf, open_clip
from tclip_jax.models.clip import param_shapes

SECONDS = 10
# Above what the process has after it has read the valid file. SECURITY.md promises no more than this.
MEMORY = 2**29
_LONGEST_MESSAGE = 2000


class Hang(BaseException):
    """An input that takes longer than SECONDS."""


def check(reader: Reader, folder: pathlib.Path) -> None:
    """Reads; raises unless it succeeds, or fails by an error of one printable line, within the time."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        reader.read(folder)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        message = str(error)
        assert "MemoryError" not in message and "allocate" not in message, f"more memory than allowed: {message}"
        assert message.isprintable() and 0 < len(message) < _LONGEST_MESSAGE, f"not one line to read: {message!r:.3000}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    left = [path for path in folder.rglob("*") if ".tmp-" in path.name or ".old-" in path.name]
    assert not left, f"left behind: {left}"


def _stop(*_: Any) -> None:
    raise Hang(f"longer than {SECONDS} s")


def main(name: str, seed: int, count: int) -> None:
    """Prints the number of inputs, or how hypothesis makes the smallest one that fails."""
    faulthandler.enable()
    signal.signal(signal.SIGALRM, _stop)
    shapes = functools.cache(param_shapes)  # most inputs are of one model, whose tracing takes longest
    for module in (manifest, gguf, open_clip, checkpoints):
        module.param_shapes = shapes  # type: ignore[attr-defined]
    remote.RETRY_SECONDS = ()  # a local file does not become another one by waiting
    reader, inputs = READERS[name](), 0
    with tempfile.TemporaryDirectory() as top:
        valid, folder = pathlib.Path(top) / "valid", pathlib.Path(top) / "changed"
        os.environ["TCLIP_CACHE_DIR"] = str(valid / "cache")
        valid.mkdir()
        reader.prepare(valid)
        reader.read(valid)
        used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        shutil.copytree(valid, folder)
        os.environ["TCLIP_CACHE_DIR"] = str(folder / "cache")

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=count,
            database=None,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        )
        @hypothesis.given(st.sampled_from(sorted(reader.files)), DOCUMENT_CHANGES, BYTE_CHANGES, st.booleans())
        def run(file: str, document: Any, raw: Any, structured: bool) -> None:
            nonlocal inputs
            inputs += 1
            path, original = folder / file, (valid / file).read_bytes()
            form = reader.files[file]
            if form and structured:
                load, store = form
                changed = store(original, change_document(load(original), document))
            else:
                changed = change_bytes(original, raw)
            shutil.rmtree(folder / "cache", ignore_errors=True)
            path.write_bytes(changed)
            reader.accept(folder, file)
            try:
                check(reader, folder)
            finally:
                for each in reader.files if reader.accept.__name__ != "<lambda>" else (file,):
                    shutil.copyfile(valid / each, folder / each)

        run()
    print(f"{name}: {inputs} inputs, seed {seed}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
