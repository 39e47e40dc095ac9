"""Checkpoints of the Hugging Face hub, from the network or from its cache."""

from __future__ import annotations

import functools

import huggingface_hub
from etils import epath

PREFIX = "hf-hub:"

# One set of weights is enough, and open_clip's comes with the metadata that says most.
_WEIGHTS = (
    ["open_clip_model.safetensors"],
    ["open_clip_pytorch_model.bin"],
    ["model.safetensors", "model-*.safetensors"],
    ["pytorch_model.bin", "pytorch_model-*.bin"],
)


def fetch(source: str) -> epath.Path:
    """The folder of `hf-hub:org/name[@revision]`: its JSON files, and one set of weights.

    Without network, and with HF_HUB_OFFLINE=1, that is what an earlier download left in the cache.

    Raises:
      FileNotFoundError: no such repository, no network and nothing cached, or no weights; one line.
    """
    name, _, revision = source.removeprefix(PREFIX).partition("@")
    snapshot = functools.partial(huggingface_hub.snapshot_download, name, revision=revision or None)
    try:
        folder = epath.Path(snapshot(allow_patterns=["*.json"]))
        has_open_clip = (folder / "open_clip_config.json").exists()
        for patterns in _WEIGHTS if has_open_clip else _WEIGHTS[2:]:
            snapshot(allow_patterns=patterns)
            if any(True for pattern in patterns for _ in folder.glob(pattern)):
                return folder
    # Its errors are the HTTP library's, the cache's and its own, and have many lines.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{source}: neither downloaded nor in the local cache: {reason}") from None
    raise FileNotFoundError(f"{source}: the repository has no weights of open_clip or transformers")
