"""`tclip import` refuses every bad source with one line that names the file and the reason, and writes nothing."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tclip_jax.cli import main
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.export import export_model
from tclip_jax.interop.gguf_file import write_file
from tclip_jax.interop.open_clip import to_open_clip
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig

Draw = Callable[[CLIPConfig], dict[str, Any]]

CONFIG = CLIPConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=(16, 16), patch_size=8, width=64, layers=1),
    text=TextConfig(context_length=8, vocab_size=50, width=64, heads=1, layers=1),
)


@pytest.fixture
def folder(tmp_path: pathlib.Path, random_params: Draw) -> pathlib.Path:
    """A valid folder of open_clip that a test may damage."""
    path = tmp_path / "theirs"
    export_model(path, config=CONFIG, preprocess=Preprocess(16), params=random_params(CONFIG), formats=["open_clip"])
    return path


def refused(source: pathlib.Path | str, message: str, capsys: pytest.CaptureFixture[str], *options: str) -> None:
    """Check that `tclip import` exits with 2, prints one line that names the source, and writes no file."""
    where = pathlib.Path(source).parent
    before = sorted(where.rglob("*"))
    assert main(["import", str(source), "--out", str(where / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tclip import: error: ") and error.count("\n") == 1 and message in error, error
    assert pathlib.Path(source).name in error
    assert sorted(where.rglob("*")) == before


def rewrite(folder: pathlib.Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "open_clip_model.safetensors"
    state = safetensors.numpy.load_file(path)
    change(state)
    safetensors.numpy.save_file(state, path)


def test_truncated_safetensors(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "open_clip_model.safetensors"
    for kept in (-1, 5000, 7, 0):
        path.write_bytes(path.read_bytes()[:kept])
        refused(folder, "open_clip_model.safetensors is truncated", capsys)


def test_a_missing_shard(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "open_clip_model.safetensors"
    shards = {name: f"shard-{i % 2}.safetensors" for i, name in enumerate(safetensors.numpy.load_file(path))}
    path.rename(folder / "shard-0.safetensors")
    (folder / f"{path.name}.index.json").write_text(json.dumps({"weight_map": shards}))
    refused(folder, "shard-1.safetensors is missing", capsys)
    (folder / f"{path.name}.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    refused(folder, "weight_map must give a plain file name", capsys)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(value: float, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(folder, lambda state: state["ln_final.bias"].__setitem__(3, value))
    refused(folder, "text/ln_final/bias is not finite", capsys)


def test_a_wrong_preset(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(folder, "its embed_dim is 16, but the given model's is 512", capsys, "--preset", "ViT-B-16")
    refused(folder / "open_clip_model.safetensors", "missing transformer.resblocks", capsys, "--preset", "ViT-B-16")
    refused(folder / "open_clip_model.safetensors", "does not state its architecture", capsys)


def test_names_that_mean_the_same(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(folder, lambda state: state.update({"module.visual.proj": state["visual.proj"]}))
    refused(folder, "holds visual.proj twice, as ", capsys)


def test_another_architecture_in_a_gguf(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "llama.gguf"
    write_file(path, {"general.architecture": "llama"}, {}, [])
    refused(path, "the architecture is 'llama': only 'clip' can be read", capsys)
    path.write_bytes(path.read_bytes()[:30])
    refused(path, "truncated", capsys)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers": 10**9}, "the model has 1000000001 layers, but the file has only 38 tensors"),
        ({"width": 2**40, "head_width": 2**20}, "the model has more than 4294967296 parameters"),
        ({"mlp_ratio": float("nan")}, "open_clip_config.json is not JSON: NaN is not a JSON number"),
        ({"mlp_ratio": 1e300}, "the model has more than"),
        ({"mlp_ratio": -1.0}, "vision_cfg.mlp_ratio is -1.0: it must be above 0"),
        ({"image_size": 1.5}, "vision_cfg.image_size is 1.5"),
    ],
)
def test_metadata_of_impossible_sizes(
    changed: dict[str, Any], message: str, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads((folder / "open_clip_config.json").read_text())
    document["model_cfg"]["vision_cfg"] |= changed
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    refused(folder, message, capsys)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[" * 10**5, "is not JSON: maximum recursion"), ("[]", "holds a list")]
)
def test_metadata_that_are_none(
    text: str, message: str, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "open_clip_config.json").write_text(text)
    refused(folder, message, capsys)


class Hostile:
    """Unpickling it creates a folder."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.torch
def test_code_in_a_pickle(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    (folder / "open_clip_model.safetensors").unlink()
    torch.save({"visual.proj": Hostile(folder / "ran")}, folder / "open_clip_pytorch_model.bin")
    refused(folder, "and only tensors are read", capsys)
    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Hostile(folder / "ran")))
    refused(folder, "is refused by torch.load(weights_only=True)", capsys)


@pytest.mark.torch
def test_a_tensor_that_repeats_its_storage(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    (folder / "open_clip_model.safetensors").unlink()
    torch.save({"visual.proj": torch.zeros(1).expand(10**6, 10**6)}, folder / "open_clip_pytorch_model.bin")
    refused(folder, "visual.proj has shape (1000000, 1000000): its storage is too small", capsys)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, random_params: Draw) -> pathlib.Path:
    """An archive like OpenAI's, whose program computes QuickGELU."""
    import open_clip
    import torch

    model = open_clip.CLIP(**CONFIG.to_open_clip() | {"quick_gelu": True}).eval()
    model.load_state_dict({k: torch.from_numpy(v) for k, v in to_open_clip(random_params(CONFIG), CONFIG).items()})
    path = tmp_path_factory.mktemp("openai") / "archive.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        inputs = torch.zeros(1, 3, 16, 16), torch.zeros(1, 8, dtype=torch.int64)
        torch.jit.trace(model, inputs, check_trace=False).save(str(path))
    return path


@pytest.mark.torch
def test_the_activation_of_an_archive_is_not_the_one_that_is_given(
    archive: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's ViT-B/16 is the preset ViT-B-16-quickgelu; ViT-B-16, which has GELU, is refused."""
    presets = {"ViT-B-16": CONFIG.to_open_clip(), "ViT-B-16-quickgelu": CONFIG.to_open_clip() | {"quick_gelu": True}}
    monkeypatch.setattr("tclip_jax.models.presets.PRESETS", presets)
    refused(archive, "its quick_gelu is True, but the given model's is False", capsys, "--preset", "ViT-B-16")
    arguments = ["import", str(archive), "--out", str(tmp_path / "out"), "--preset", "ViT-B-16-quickgelu"]
    assert main(arguments) == 0


@pytest.mark.torch
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info, data: (info, data + b"\0"), "it must hold 64 float32, uncompressed"),
        (lambda info, data: (compressed(info), data), "it must hold 64 float32, uncompressed"),
    ],
)
def test_storages_of_an_archive_that_are_not_their_size(
    change: Callable[..., Any], message: str, archive: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    broken = tmp_path / "broken.pt"
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(broken, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            if "/data/" in info.filename and len(data) == 256:
                info, data = change(info, data)
            target.writestr(info, data)
    refused(broken, message, capsys)


def compressed(info: zipfile.ZipInfo) -> zipfile.ZipInfo:
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


@pytest.mark.torch
def test_a_damaged_archive(archive: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    """Change one byte of a weight, of the program, and of the directory."""
    broken, contents = tmp_path / "broken.pt", {}
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(tmp_path / "stored.pt", "w") as target:
        for name in source.namelist():
            contents[name] = source.read(name)
            target.writestr(name, contents[name])
        directory = target.start_dir
    whole = (tmp_path / "stored.pt").read_bytes()
    weight = max((name for name in contents if "/data/" in name), key=lambda name: len(contents[name]))
    program = max((name for name in contents if name.endswith(".py")), key=lambda name: len(contents[name]))
    places = [whole.index(contents[name]) for name in (weight, program)]
    for place, message in (
        *((place, "is not a readable TorchScript archive: Bad CRC-32") for place in places),
        (directory, "is refused by torch.load(weights_only=True): "),
    ):
        broken.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        refused(broken, message, capsys)


@pytest.mark.torch
def test_bombs_in_an_archive(archive: pathlib.Path, tmp_path: pathlib.Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("tclip_jax.interop.torchscript._MAX_TEXT", 2**20)
    for suffix, message in (("data.pkl", "at most 1048576 are read"), (".py", "more than 1048576 bytes, the limit")):
        bomb = tmp_path / "bomb.pt"
        with zipfile.ZipFile(archive) as source, zipfile.ZipFile(bomb, "w") as target:
            for info in source.infolist():
                data = source.read(info)
                if info.filename.endswith(suffix):
                    info, data = compressed(info), bytes(2**20 + 1)
                target.writestr(info, data)
        refused(bomb, message, capsys)
