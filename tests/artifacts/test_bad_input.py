"""A forged artifact gives a one-line error and exit code 2, and allocates nothing large."""

from __future__ import annotations

import json
import pathlib
import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import zstandard

from tclip_jax.artifacts.manifest import MANIFEST
from tclip_jax.cli import main

Tree = dict[str, Any]
Forge = Callable[..., pathlib.Path]

FC1, FILE = "image/blocks/mlp/fc1/kernel", "ternary.safetensors"


def flipped_byte(folder: pathlib.Path, forge: Forge) -> None:
    data = bytearray((folder / FILE).read_bytes())
    data[-1] ^= 1
    (folder / FILE).write_bytes(data)


def truncated_file(folder: pathlib.Path, forge: Forge) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-1])


def truncated_file_with_forged_checksums(folder: pathlib.Path, forge: Forge) -> None:
    truncated_file(folder, forge)
    forge(changed=(FILE,))


def newer_version(folder: pathlib.Path, forge: Forge) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format_version": 3}))


def other_shape(folder: pathlib.Path, forge: Forge) -> None:
    forge(lambda manifest: manifest["tensors"][FC1].update(shape=[2, 24, 2**20]))


def wider_model(folder: pathlib.Path, forge: Forge) -> None:
    """Change the configuration to one with 2³¹ parameters, which must not be allocated, but not the tensors."""
    forge(lambda manifest: manifest["model_cfg"]["text_cfg"].update(vocab_size=2**27))


def other_group(folder: pathlib.Path, forge: Forge) -> None:
    forge(lambda manifest: manifest["tensors"][FC1].update(group=1))


def other_scales(folder: pathlib.Path, forge: Forge) -> None:
    """Write one scale less than the shape and the group in tclip.json require."""
    scales = zstandard.compress(np.ones(2 * 2 * 96 - 1, np.float16).tobytes())
    replace(folder, f"{FC1}.scale", scales)
    forge(changed=(FILE,))


def zstd_bomb(folder: pathlib.Path, forge: Forge) -> None:
    bomb = zstandard.ZstdCompressor().compressobj(size=2**28)
    replace(folder, f"{FC1}.trits", b"".join(bomb.compress(bytes(2**20)) for _ in range(2**8)) + bomb.flush())
    forge(changed=(FILE,))


def large_bomb(folder: pathlib.Path, forge: Forge) -> None:
    """Write a frame larger than its tensor can be, so that the file exceeds its size limit."""
    replace(folder, f"{FC1}.trits", bytes(2**24))
    forge(changed=(FILE,))


def other_vocabulary(folder: pathlib.Path, forge: Forge) -> None:
    """Exchange two tokens: every id is valid, but texts would be tokenized differently."""
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary["cat</w>"], vocabulary["dog</w>"] = vocabulary["dog</w>"], vocabulary["cat</w>"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    forge(changed=("vocab.json",))


def other_merges(folder: pathlib.Path, forge: Forge) -> None:
    (folder / "merges.txt").write_text((folder / "merges.txt").read_text().replace("\nt h\n", "\nh t\n", 1))
    forge(changed=("merges.txt",))


def replace(folder: pathlib.Path, name: str, data: bytes) -> None:
    stored = safetensors.numpy.load((folder / FILE).read_bytes())
    (folder / FILE).write_bytes(safetensors.numpy.save(stored | {name: np.frombuffer(data, np.uint8)}))


@pytest.fixture(scope="module")
def warm(written: pathlib.Path) -> None:
    """Read an artifact once, so that imports and the first trace do not count."""
    assert main(["inspect", str(written)]) == 0


@pytest.mark.parametrize(
    ("forgery", "message"),
    [
        (flipped_byte, f"{FILE} is damaged: its bytes do not have the sha256"),
        (truncated_file, rf"{FILE} has \d+ bytes: tclip.json gives \d+"),
        (
            truncated_file_with_forged_checksums,
            rf"{FILE} is truncated or damaged: it has \d+ bytes, its header states \d+",
        ),
        (
            newer_version,
            "format_version is 3, and this tclip_jax reads 1 to 2: a newer artifact needs a newer tclip_jax",
        ),
        (other_shape, rf"{FC1} has shape \[2, 24, 1048576\]: it must be \[2, 24, 96\]"),
        (wider_model, r"embedding has shape \[50, 16\]: it must be \[134217728, 16\]"),
        (other_group, rf"{FC1} has scale_shape \[2, 2, 96\]: it must be \[2, 24, 96\]"),
        (other_scales, rf"{FC1}\.scale expands to 766 bytes: the frame must declare 768"),
        (zstd_bomb, rf"{FC1}\.trits expands to 268435456 bytes: the frame must declare 922"),
        (large_bomb, rf"{FILE} has \d+ bytes: its limit is \d+"),
        (other_vocabulary, r"vocab\.json holds another vocabulary: only CLIP's is supported"),
        (other_merges, r"merges\.txt holds another vocabulary: only CLIP's is supported"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_it_is_refused_on_one_line(
    artifact: pathlib.Path,
    forge: Forge,
    warm: None,
    forgery: Callable[[pathlib.Path, Forge], None],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forgery(artifact, forge)
    tracemalloc.start()
    code = main(["inspect", str(artifact)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    captured = capsys.readouterr()
    assert (code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert captured.err.startswith("tclip inspect: error: ")
    assert re.search(message, captured.err)
    assert peak < 16 * 2**20


def test_the_same_vocabulary_in_another_form_is_read(artifact: pathlib.Path, forge: Forge) -> None:
    text = (artifact / "vocab.json").read_text()
    (artifact / "vocab.json").write_text(json.dumps(json.loads(text), indent=1, sort_keys=True))
    (artifact / "merges.txt").write_text((artifact / "merges.txt").read_text().replace("\n", "\r\n"))
    forge(changed=("vocab.json", "merges.txt"))
    assert main(["inspect", str(artifact)]) == 0
