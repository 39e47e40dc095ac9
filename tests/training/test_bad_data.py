"""A run over shards with every kind of bad data, killed in the middle."""

from __future__ import annotations

import collections
import io
import json
import os
import pathlib
import re
import socket
import struct
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from tclip_jax.data.tokenizer import Tokenizer

SAMPLES, BATCH, EPOCHS = 96, 8, 2

PROCESS = """
import os, signal, sys, time
index, port, work, kill_at = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_disable_most_optimizations", True)
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
import json, pathlib, fsspec
from fsspec.implementations.local import LocalFileSystem
from tclip_jax.data.pipeline import TrainIterator
from tclip_jax.data.sources import remote
from tclip_jax.training import loop
from tclip_jax.runs.steps import saved_steps
from tclip_jax.runs.config import base_config

class Store(LocalFileSystem):
    protocol = "store"
    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("store://")
    def _open(self, path, *arguments, **options):
        if path.endswith("10.tar"):
            raise ConnectionError("the store is away")
        return super()._open(path, *arguments, **options)
    def cat_file(self, path, **options):
        if path.endswith("11.tar"):
            raise ConnectionError("the store went away")
        return super().cat_file(path, **options)

fsspec.register_implementation("store", Store)
remote.RETRY_SECONDS = (0.01,)
draw = TrainIterator.__next__

def watched(self):
    start = self.get_state()["samples"]
    if kill_at and start >= kill_at:
        while not saved_steps(work + "/run/checkpoints"):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    batch = draw(self)
    record = {"start": start, "tokens": batch["tokens"].tolist(), "weight": batch["weight"].tolist()}
    with open(f"{work}/batches.{index}.jsonl", "a") as file:
        file.write(json.dumps(record) + "\\n")
    return batch

TrainIterator.__next__ = watched
loop.Model = lambda *_: None  # it needs arrays of a single process
config = base_config()
config.model.embed_dim = 16
config.model.vision_cfg.update({"image_size": 16, "width": 16, "layers": 1, "head_width": 8})
config.model.text_cfg.update({"context_length": 12, "width": 16, "layers": 1})
config.steps, config.checkpoint.every = int(sys.argv[5]), 3
config.data.update({"source": f"wds:store://{work}/shards/{{00..19}}.tar", "batch_size": 8, "max_bad_share": 0.5})
loop.train(config, work + "/run")
"""


def picture(kind: str = "PNG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 24, 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"save_all": True, "append_images": [image.rotate(90)]} if kind == "GIF" else {}))
    return buffer.getvalue()


def grey_of_16_bits() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 150).save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


class Shards:
    """Writes tars; records the captions of good samples (`sample 0 1 2`) and the kinds of bad ones."""

    def __init__(self, folder: pathlib.Path) -> None:
        folder.mkdir()
        self.folder, self.good, self.bad = folder, 0, collections.Counter[str]()

    def next(self) -> str:
        self.good += 1
        return f"sample {self.good - 1:03}"

    def write(
        self, number: int, *samples: tuple[str, bytes | None, bytes | str | None], bad: tuple[str, ...] = ()
    ) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for key, image, text in samples:
                text = text.encode() if isinstance(text, str) else text
                for suffix, data in (("jpg", image), ("txt", text)):
                    if data is not None:
                        info = tarfile.TarInfo(f"{key}.{suffix}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
        (self.folder / f"{number:02}.tar").write_bytes(buffer.getvalue())
        self.bad.update(bad)

    @property
    def samples(self) -> int:
        return self.good + sum(self.bad.values())


def write_shards(folder: pathlib.Path) -> Shards:
    shards, png, jpeg = Shards(folder), picture(), picture("JPEG")
    unusual = [picture("GIF"), grey_of_16_bits(), picture("JPEG", "CMYK"), picture("PNG", "P"), picture("PNG", "RGBA")]
    texts = [shards.next() for _ in unusual]
    texts[0] += " and so on" * 100_000
    texts[1] += " <|endoftext|> <end_of_text> <start_of_text>"
    shards.write(0, *((f"{i}", *each) for i, each in enumerate(zip(unusual, texts, strict=True))))
    corrupt = [("a", b"\xff\xd8\xff no image", "x"), ("b", jpeg[:-200], "x"), ("c", png, shards.next())]
    shards.write(1, *corrupt, bad=("corrupt_image", "corrupt_image"))
    shards.write(2, ("a", bomb(), "x"), ("b", jpeg, shards.next()), bad=("too_many_pixels",))
    shards.write(3, ("a", png, ""), ("b", png, " \n"), ("c", png, shards.next()), bad=("no_caption",) * 2)
    shards.write(4, ("a", png, b"caf\xe9"), ("b", png, shards.next()), bad=("invalid_utf8",))
    alone = [("a", png, None), ("b", None, "x"), ("c", png, shards.next())]
    shards.write(5, *alone, bad=("no_caption", "no_image"))
    twice = [*((key, png, shards.next()) for key in "acd"), ("a", png, "x")]
    shards.write(6, *twice, bad=("duplicate_key",))
    shards.write(7, ("../../a", png, "x"), ("/b", png, "x"), ("c", png, shards.next()), bad=("unsafe_name",) * 2)
    shards.write(8, bad=("empty_shard",))
    (folder / "08.tar").write_bytes(b"")
    shards.write(9, ("a", png, shards.next()), ("b", png, "x"), bad=("broken_shard", "no_caption"))
    whole = (folder / "09.tar").read_bytes()
    (folder / "09.tar").write_bytes(whole[: 2 * (2 * 512 + 512 + -(-len(png) // 512) * 512) - 700])
    shards.write(10, ("a", png, "x"), ("b", png, "x"), bad=("unreadable",))
    shards.write(11, ("a", png, "x"), ("b", png, "x"), bad=("unreadable",) * 2)
    for number in range(12, 20):
        fill = -(-(SAMPLES - shards.samples) // (20 - number))
        shards.write(number, *((f"{i}", png, shards.next()) for i in range(fill)))
    assert shards.samples == SAMPLES
    return shards


def run(work: pathlib.Path, kill_at: int) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"TCLIP_CACHE_DIR": str(work / "cache")}
    steps = str(EPOCHS * SAMPLES // BATCH)
    processes = []
    for index in range(2):
        with (work / f"stderr.{index}").open("w") as stderr:
            arguments = [str(index), port, str(work), str(kill_at), steps]
            command = [sys.executable, "-c", PROCESS, *arguments]
            processes.append(subprocess.Popen(command, stderr=stderr, env=environment, text=True))
    return processes


def batches_of(work: pathlib.Path, process: int) -> list[dict[str, list[float]]]:
    return [json.loads(line) for line in (work / f"batches.{process}.jsonl").read_text().splitlines()]


@pytest.mark.faults
@pytest.mark.slow
def test_every_good_sample_is_used_once_per_epoch(tmp_path: pathlib.Path) -> None:
    shards = write_shards(tmp_path / "shards")
    first = run(tmp_path, kill_at=SAMPLES)
    assert first[1].wait(timeout=900) == -9, (tmp_path / "stderr.1").read_text()[-2000:]
    first[0].kill()
    first[0].wait()
    before = len(batches_of(tmp_path, 0))
    saved = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())

    for i, process in enumerate(run(tmp_path, kill_at=0)):
        assert process.wait(timeout=900) == 0, (tmp_path / f"stderr.{i}").read_text()[-2000:]

    assert batches_of(tmp_path, 0)[before]["start"] == saved * BATCH > 0
    rows: dict[tuple[int, int, int], tuple[str, float]] = {}
    for process in range(2):
        for batch in batches_of(tmp_path, process):
            for row, (tokens, weight) in enumerate(zip(batch["tokens"], batch["weight"], strict=True)):
                key = int(batch["start"]), process, row  # type: ignore[call-overload]
                text = Tokenizer(12).decode(tokens)  # type: ignore[arg-type]
                assert rows.setdefault(key, (text, weight)) == (text, weight)  # also after the restart
    good = sorted(f"sample {i // 100} {i // 10 % 10} {i % 10}" for i in range(shards.good))
    for epoch in range(EPOCHS):
        of_epoch = [rows[start, p, row] for start, p, row in rows if start // SAMPLES == epoch]
        assert len(of_epoch) == SAMPLES
        texts = [re.match(r"sample \d \d \d|", text)[0] for text, weight in of_epoch if weight]  # type: ignore[index]
        assert sorted(texts) == good

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    counted: collections.Counter[str] = collections.Counter()
    for line in lines:
        counted.update({name[4:]: int(value) for name, value in line.items() if name.startswith("bad/")})
    assert counted == {kind: EPOCHS * count for kind, count in shards.bad.items()}
    listed = [
        json.loads(line)
        for name in ("bad_samples.jsonl", "bad_samples.1.jsonl")
        for line in (tmp_path / "run" / name).read_text().splitlines()
    ]
    assert collections.Counter({each["name"]: each["kind"] for each in listed}.values()) == shards.bad
