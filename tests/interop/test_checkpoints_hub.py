"""Checkpoints of the Hugging Face hub, from a cache that the test creates, without a network."""

from __future__ import annotations

import pathlib

import pytest
from huggingface_hub import constants

from tclip_jax.interop.checkpoints import fetch

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Return the cached snapshot of org/name, offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    "files",
    [
        ("open_clip_config.json", "open_clip_model.safetensors"),
        ("open_clip_config.json", "open_clip_pytorch_model.bin"),
        ("config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"),
        ("config.json", "pytorch_model.bin"),
    ],
)
def test_a_cached_model_needs_no_network(files: tuple[str, ...], snapshot: pathlib.Path) -> None:
    for name in files:
        (snapshot / name).write_text("{}")
    assert fetch("hf-hub:org/name") == snapshot
    assert fetch(f"hf-hub:org/name@{COMMIT}") == snapshot


def test_what_is_not_cached_is_an_error_of_one_line(snapshot: pathlib.Path) -> None:
    for source in ("hf-hub:org/other", "hf-hub:org/name@v2", "hf-hub:not a name"):
        with pytest.raises(
            FileNotFoundError, match=f"^{source}: could not be downloaded and is not in the local cache: "
        ) as raised:
            fetch(source)
        assert "\n" not in str(raised.value)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"^hf-hub:org/name: the repository has no weights"):
        fetch("hf-hub:org/name")
    (snapshot / "open_clip_model.safetensors").write_text("")
    with pytest.raises(FileNotFoundError, match="has no weights"):
        fetch("hf-hub:org/name")
