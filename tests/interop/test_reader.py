from __future__ import annotations

import importlib
import json
import os
import pathlib
import tracemalloc
import warnings
import zipfile
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from tclip_jax.interop.reader import open_weights, read_json
from tclip_jax.interop.torchscript import torchscript_activation

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.float16)


def shards(folder: pathlib.Path, **files: str) -> pathlib.Path:
    """Write two shards and their index; `files` changes its weight_map."""
    safetensors.numpy.save_file({"a": A}, folder / "model-1.safetensors")
    safetensors.numpy.save_file({"b": B}, folder / "model-2.safetensors")
    index = folder / "model.safetensors.index.json"
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"} | files
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return index


def test_shards_are_one_set_of_tensors(tmp_path: pathlib.Path) -> None:
    weights = open_weights(shards(tmp_path))
    assert [file.name for file in weights.files] == ["model-1.safetensors", "model-2.safetensors"]
    np.testing.assert_array_equal(weights.tensors["a"], A)
    assert weights.tensors["b"].dtype == np.float16


def test_a_missing_shard_is_named(tmp_path: pathlib.Path) -> None:
    index = shards(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors is missing: model\.safetensors\.index\.json"):
        open_weights(index)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"b": "../model-2.safetensors"}, "weight_map must give a plain file name"),
        ({"b": "model.safetensors.index.json"}, "weight_map must give a plain file name"),
        ({"b": "model-1.safetensors"}, r"model-1\.safetensors lacks b"),
    ],
)
def test_an_index_that_cannot_be_right(files: dict[str, str], message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_weights(shards(tmp_path, **files))


def test_other_suffixes_and_other_json_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: no such file"):
        open_weights(tmp_path / "none.safetensors")
    (tmp_path / "model.h5").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"model\.h5: a weights file is .* not \.h5"):
        open_weights(tmp_path / "model.h5")
    for content, message in (("[1]", "holds a list"), ("{", "is not JSON")):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_json(epath.Path(tmp_path / "x.json"))


@pytest.mark.torch
@pytest.mark.parametrize("nested", [False, True])
def test_pickles_of_every_float_type(nested: bool, tmp_path: pathlib.Path) -> None:
    import torch

    state = {str(dtype): torch.randn(3, 4).to(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    state["parameter"] = torch.nn.Parameter(torch.ones(2))
    state["view"] = torch.arange(12.0).reshape(3, 4).T
    torch.save({"epoch": 3, "state_dict": state} if nested else state, tmp_path / "w.bin")
    tensors = open_weights(tmp_path / "w.bin").tensors
    assert tensors.keys() == state.keys()
    for name, value in state.items():
        assert tensors[name].dtype.name == str(value.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(np.asarray(tensors[name], np.float32), value.detach().float().numpy())


@pytest.mark.torch
def test_a_pickle_of_before_zip_files(tmp_path: pathlib.Path) -> None:
    import torch

    torch.save({"a": torch.from_numpy(A)}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(open_weights(tmp_path / "w.pt").tensors["a"], A)


class Hostile:
    """Unpickling it creates a folder."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(zipped: bool, tmp_path: pathlib.Path) -> None:
    import torch

    torch.save({"a": Hostile(tmp_path / "ran")}, tmp_path / "w.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"w\.bin is refused .*: it holds \w+\.mkdir, and only tensors") as raised:
        open_weights(tmp_path / "w.bin")
    assert "\n" not in str(raised.value) and not (tmp_path / "ran").exists()


@pytest.mark.torch
@pytest.mark.parametrize("content", [b"", b"not a pickle", "half"])
def test_a_broken_pickle_is_refused_in_one_line(content: bytes | str, tmp_path: pathlib.Path) -> None:
    import torch

    torch.save({"a": torch.zeros(1000)}, tmp_path / "w.bin")
    data = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(data[: len(data) // 2] if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=r"w\.bin is refused by torch\.load") as raised:
        open_weights(tmp_path / "w.bin")
    assert "\n" not in str(raised.value)


@pytest.mark.torch
@pytest.mark.parametrize("saved", [[1.0], {"a": 1}, {"state_dict": {"a": [1]}}, {3: np.zeros(2)}])
def test_a_pickle_of_something_else_is_refused(saved: Any, tmp_path: pathlib.Path) -> None:
    import torch

    saved = {3: torch.zeros(2)} if 3 in saved else saved
    torch.save(saved, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt holds no state dict"):
        open_weights(tmp_path / "w.pt")


@pytest.mark.torch
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda torch: torch.eye(3).to_sparse(), "is sparse, nested or without values: only dense tensors are read"),
        (lambda torch: torch.ones(2, device="meta"), "is sparse, nested or without values"),
        (lambda torch: torch.ones(2).to(torch.float8_e4m3fn), "is float8_e4m3fn: only float16, bfloat16, float32"),
        (lambda torch: torch.ones(2, dtype=torch.complex64), "is complex64: only"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(make: Any, message: str, tmp_path: pathlib.Path) -> None:
    import torch

    torch.save({"a": make(torch)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=rf"w\.pt: a {message}"):
        open_weights(tmp_path / "w.pt")


def test_without_torch_a_pickle_asks_for_it(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_torch(name: str) -> Any:
        raise ImportError(name)

    (tmp_path / "w.bin").write_bytes(b"x")
    monkeypatch.setattr(importlib, "import_module", no_torch)
    with pytest.raises(ValueError, match=r"w\.bin is a pickle, which needs PyTorch .*tclip-jax\[torch\]"):
        open_weights(tmp_path / "w.bin")


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, dict[str, Any]]:
    """A small program like OpenAI's: nested modules, half precision, a strided weight, QuickGELU."""
    import torch

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_fc = torch.nn.Linear(4, 3).half()
            self.weight = torch.nn.Parameter(torch.randn(3, 5).T)
            self.register_buffer("input_resolution", torch.tensor(16))
            self.attn_mask = torch.zeros(2, 2)

        def forward(self, x: Any) -> Any:
            x = x + self.attn_mask.sum()
            return x * torch.sigmoid(1.702 * x) @ self.weight @ self.c_fc.weight.float().sum(1)

    path = tmp_path_factory.mktemp("script") / "clip.pt"
    module = torch.nn.Sequential(Block(), torch.nn.Identity())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.trace(module, torch.zeros(2, 5), check_trace=False).save(str(path))
    return path, module.state_dict()


@pytest.mark.torch
def test_a_torchscript_archive_has_the_state_dict(scripted: tuple[pathlib.Path, dict[str, Any]]) -> None:
    path, state = scripted
    tensors = open_weights(path).tensors
    assert tensors.keys() == state.keys()
    for name, value in state.items():
        assert tensors[name].dtype == value.numpy().dtype
        np.testing.assert_array_equal(tensors[name], value.numpy())
    assert torchscript_activation(epath.Path(path)) is True


@pytest.mark.torch
def test_a_torchscript_archive_with_other_classes_or_sizes_is_refused(
    scripted: tuple[pathlib.Path, dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    for old, new, message in (
        (b"ctorch._utils\n_rebuild_tensor_v2\n", b"cos\nmkdir\n", r"it holds os\.mkdir, and only tensors"),
        (b"K\x0f", b"K\x0e", "has 60 bytes: it must hold 14 float32"),
        (b"K\x05K\x03", b"K\x05K\x04", "has 15 numbers: it cannot hold"),
    ):
        with zipfile.ZipFile(scripted[0]) as source, zipfile.ZipFile(tmp_path / "w.pt", "w") as target:
            for name in source.namelist():
                data = source.read(name)
                assert not name.endswith("data.pkl") or old in data
                target.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)
        with pytest.raises(ValueError, match=rf"w\.pt is not a readable TorchScript archive: .*{message}"):
            open_weights(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"\x80\x02}r\xff\xff\xff\x7f.", "data.pkl has the memo index 2147483647: it must be below its 9 bytes"),
        (b"\x80\x02}p4294967296\n.", "data.pkl has the memo index 4294967296"),
        (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".", "expected 1099511627776 bytes in a bytearray8"),
        (b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b".", "expected 1099511627776 bytes in a bytes8"),
        (b"\x80\x02cc\x1bol\nOrderedDict\n.", "only tensors are read"),
    ],
)
def test_a_pickle_in_an_archive_asks_for_no_more_memory_than_it_has(
    pickled: bytes, message: str, tmp_path: pathlib.Path
) -> None:
    """Found by tests/fuzz: pickle itself would allocate as much as these indices state."""
    path = tmp_path / "clip.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("clip/data.pkl", pickled)
        archive.writestr("clip/code/model.py", b"")
    tracemalloc.start()
    with pytest.raises(ValueError, match=message) as raised:
        open_weights(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    assert str(raised.value).isprintable()
