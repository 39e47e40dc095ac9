from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from tclip_jax.artifacts import ArtifactError, read_artifact
from tclip_jax.artifacts.files import open_safetensors

Tree = dict[str, Any]
Forge = Callable[[Callable[[Tree], Any]], pathlib.Path]

FILES = ["tclip.json", "ternary.safetensors", "rest.safetensors", "tokenizer.json", "preprocessor_config.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(artifact: pathlib.Path, name: str) -> None:
    (artifact / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing: a complete artifact has it$"):
        read_artifact(artifact)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.01, 0.5, 0.99])
def test_a_flipped_byte_is_noticed(artifact: pathlib.Path, name: str, where: float) -> None:
    data = bytearray((artifact / name).read_bytes())
    data[int(where * len(data))] ^= 0x10
    (artifact / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{name}( is damaged| is not JSON|: )"):
        read_artifact(artifact)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_truncated_file_is_noticed_by_its_size(artifact: pathlib.Path, name: str) -> None:
    data = (artifact / name).read_bytes()
    (artifact / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match=f"{name} has {len(data) // 2} bytes: tclip.json gives {len(data)}"):
        read_artifact(artifact)


def test_a_truncated_manifest_is_noticed(artifact: pathlib.Path) -> None:
    data = (artifact / "tclip.json").read_bytes()
    (artifact / "tclip.json").write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match=r"^tclip\.json is not JSON"):
        read_artifact(artifact)


@pytest.mark.parametrize("name", ["ternary.safetensors", "rest.safetensors", "tokenizer.json", "tclip.json"])
def test_files_larger_than_they_can_be_are_not_read(artifact: pathlib.Path, forge: Forge, name: str) -> None:
    if name != "tclip.json":
        forge(lambda manifest: manifest["files"][name].update(bytes=2**40))
    with (artifact / name).open("r+b") as file:
        file.truncate(2**40)  # sparse: it takes no space, but would not fit in memory
    with pytest.raises(ArtifactError, match=rf"{name} has {2**40} bytes: its limit is \d+"):
        read_artifact(artifact)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: f.pop("rest.safetensors"), "files lacks rest.safetensors"),
        (
            lambda f: f.update({"../secret": {"bytes": 1, "sha256": ""}}),
            "files has the key '../secret': it must be a plain file name",
        ),
        (lambda f: f.update({"/etc/hostname": {}}), "files has the key '/etc/hostname': it must be a plain file name"),
        (lambda f: f.update({"vocab.json": 3}), "the entry of vocab.json must have exactly the keys bytes and sha256"),
        (lambda f: f["vocab.json"].pop("sha256"), "vocab.json must have exactly the keys bytes and sha256"),
        (lambda f: f["vocab.json"].update(bytes="many"), "vocab.json has .* bytes: tclip.json gives 'many'"),
        (lambda f: f["vocab.json"].update(sha256=0), "vocab.json is damaged"),
    ],
)
def test_forged_file_entries_are_refused(forge: Forge, edit: Callable[[Tree], Any], message: str) -> None:
    folder = forge(lambda manifest: edit(manifest["files"]))
    with pytest.raises(ArtifactError, match=message):
        read_artifact(folder)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 64, b"\x08" + bytes(7) + b"{}      more", safetensors.numpy.save({"x": np.ones(3)})[:-1]]
)
def test_bytes_that_are_not_safetensors_are_refused(data: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"/x is (not a safetensors file|truncated)"):
        open_safetensors(epath.Path(tmp_path / "x"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "nowhere: no such folder; expected the folder of an artifact"),
        (["checkpoints/100/params", "config.json"], "is the workdir of a run: `tclip pack .*x --out DIR` makes an"),
        (["open_clip_config.json"], "is a checkpoint of another library: `tclip import .*x --out DIR` makes an"),
        (["config.json"], "is a checkpoint of another library: "),
        (["picture.png"], r"x/tclip\.json is missing: a complete artifact has it$"),
    ],
)
def test_the_error_says_what_a_folder_is(files: list[str] | None, message: str, tmp_path: pathlib.Path) -> None:
    for file in files or ():
        (tmp_path / "x" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / file).write_text("")
    with pytest.raises(ArtifactError, match=message):
        read_artifact(tmp_path / ("nowhere" if files is None else "x"))
    if files == ["picture.png"]:
        with pytest.raises(ArtifactError, match=r"picture\.png: a file; expected the folder"):
            read_artifact(tmp_path / "x" / "picture.png")
