"""An index cache for each test, and tars as img2dataset writes them, with a few faults."""

from __future__ import annotations

import io
import pathlib
import tarfile
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from PIL import Image


def encode(seed: int, width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: pathlib.Path, members: Iterable[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Indices and copies of one test are not found by another."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TCLIP_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def jpeg() -> Callable[[int], bytes]:
    """The image of noise of a seed."""
    return encode


@pytest.fixture
def tars(tmp_path: pathlib.Path) -> pathlib.Path:
    """Four shards: three good samples; two good and two bad; two good ones and one that is cut off; nothing."""
    folder = tmp_path / "tars"
    folder.mkdir()
    shards: list[list[tuple[str, bytes]]] = [
        [(f"00000{i}.{suffix}", data) for i in range(3) for suffix, data in (("jpg", encode(i)), ("txt", b"a dog"))],
        [
            *(("000010.jpg", encode(10)), ("000010.txt", "ein Café\nand a line".encode())),
            *(("000011.jpg", encode(11)[:400]), ("000011.txt", b"cut")),
            *(("000012.jpg", encode(12)), ("000012.json", b"{}")),
            *(("000013.jpg", encode(0)), ("000013.txt", b"the first again " * 40)),
        ],
        [(f"00002{i}.{suffix}", data) for i in range(3) for suffix, data in (("jpg", encode(20 + i)), ("txt", b"cat"))],
    ]
    for number, members in enumerate(shards):
        write_tar(folder / f"{number:05}.tar", members)
    whole = (folder / "00002.tar").read_bytes()
    (folder / "00002.tar").write_bytes(whole[: whole.index(b"000022.jpg") + 700])
    (folder / "00003.tar").write_bytes(b"")
    return folder
