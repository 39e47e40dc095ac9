"""Read the folder that `tclip export --to torch` writes; every size is checked before anything is built from it."""

import json
import pathlib
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from tclip_torch.linear import (
    ACTIVATIONS,
    CHUNK,
    FLOATS,
    PANEL,
    PackedEmbedding,
    PackedLinear,
    default_activations,
    take_columns,
)

FORMAT = {"format": "tclip_torch", "version": 1}
_MAX_JSON_BYTES = 8 * 2**20
_ZEROS = 0x55555555  # a word of zero trits


class Weights:
    """The tensors of an exported model by open_clip's names, memory-mapped; packed ones as layers.

    Attributes:
      config: `model_cfg` and `preprocess_cfg` of open_clip, and `transformers`, the names of CLIPModel's tensors.
      packed: name -> shape (N, K) as PyTorch has it, and group, of each packed weight.
      activations: of the layers.
    """

    def __init__(self, folder: str | pathlib.Path, activations: str | None = None) -> None:
        """Open a folder.

        Args:
          folder: the folder with config.json and model.safetensors.
          activations: "A32", "A16" or "A8", see `tclip_torch.linear.linear`; None selects `default_activations`.

        Raises:
          ValueError: the folder is not an export of this version, or a file is damaged; the message names it.
          OSError: a file cannot be read.
        """
        if activations not in (None, *ACTIVATIONS):
            raise ValueError(f"activations {activations!r} is not one of {', '.join(ACTIVATIONS)}")
        self.activations = activations or default_activations()
        self.config = _read_config(pathlib.Path(folder) / "config.json")
        self._path = pathlib.Path(folder) / "model.safetensors"
        try:
            # The library checks that the header fits the size of the file.
            self._file = safetensors.safe_open(str(self._path), framework="pt")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{self._path} is not a safetensors file: {error!s:.200}") from None
        self._stored = set(self._file.keys())
        self.packed = {
            name: (tuple(entry["shape"]), entry["group"]) for name, entry in self.config.get("packed", {}).items()
        }
        parts = {f"{name}.{part}" for name in self.packed for part in ("words", "scales")}
        if missing := sorted(parts - self._stored):
            raise ValueError(f"{self._path} lacks {missing[0]}, which config.json lists as packed")
        self.names = (self._stored - parts) | set(self.packed)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; for a packed one that of the weight.

        Raises:
          ValueError: there is none of this name.
        """
        if name in self.packed:
            return self.packed[name][0]
        if name not in self.names:
            raise ValueError(f"{self._path} lacks {name}")
        return tuple(self._file.get_slice(name).get_shape())

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a float tensor, of this shape if one is given.

        Raises:
          ValueError: it is missing, packed, not float32, or of another shape.
        """
        self.check(name, shape)
        if name in self.packed:
            raise ValueError(f"{self._path}: {name} is packed: there must be a layer for it")
        return self._part(name, (torch.float32,))

    def check(self, name: str, shape: tuple[int, ...] | None) -> None:
        """Raise ValueError if a tensor is missing or has another shape."""
        if shape not in (None, self.shape(name)):
            raise ValueError(f"{self._path}: {name} has shape {self.shape(name)}: the model's is {shape}")

    def linear(
        self, weight: str, bias: str, shape: tuple[int, int] | None = None, third: int | None = None
    ) -> nn.Module:
        """Return a linear layer, packed or float.

        Args:
          weight: name of the weight (N, K).
          bias: name of the bias (N).
          shape: the expected (N, K); None for any.
          third: take only this third of the outputs: 0 queries, 1 keys, 2 values.

        Raises:
          ValueError: a tensor is missing, has another shape, or holds what is not a trit.
        """
        self.check(weight, shape)
        rows, columns = self.shape(weight)
        values = self.tensor(bias, (rows,))
        start, stop = (0, rows) if third is None else (third * (rows // 3), (third + 1) * (rows // 3))
        if weight in self.packed:
            words, scales = self._matrix(weight)
            if third is not None:
                words, scales = take_columns(words, start, stop, _ZEROS), take_columns(scales, start, stop, 0)
            group = self.packed[weight][1]
            return PackedLinear(words, scales, values[start:stop], (stop - start, columns), group, self.activations)
        layer = nn.Linear(1, 1, device="meta")
        layer.out_features, layer.in_features = stop - start, columns
        layer.weight = nn.Parameter(self.tensor(weight)[start:stop], requires_grad=False)
        layer.bias = nn.Parameter(values[start:stop], requires_grad=False)
        return layer

    def embedding(self, name: str, shape: tuple[int, int] | None = None) -> nn.Module:
        """Return an embedding table, packed or float, of this shape (V, W) if one is given.

        Raises:
          ValueError: as for `linear`.
        """
        self.check(name, shape)
        if name not in self.packed:
            return nn.Embedding.from_pretrained(self.tensor(name))
        (rows, width), group = self.packed[name]
        words, scales = self._part(f"{name}.words", (torch.uint8,)), self._part(f"{name}.scales", tuple(FLOATS))
        groups = -(-width // group)
        if words.shape != (rows, -(-width // 4)) or tuple(scales.shape) not in {
            (a, b) for a in (1, rows) for b in (1, groups)
        }:
            raise ValueError(
                f"{self._path}: {name}.words {tuple(words.shape)} do not hold {rows} rows of {width} trits"
            )
        self._check_values(name, words, ((words >> 1) & ~words) & 0x55, scales)  # the field 2 is −2
        return PackedEmbedding(words, scales, width, group)

    def _matrix(self, name: str) -> tuple[Tensor, Tensor]:
        (columns, length), group = self.packed[name]
        words, scales = self._part(f"{name}.words", (torch.int32,)), self._part(f"{name}.scales", tuple(FLOATS))
        (whole, rest), panels = divmod(length, group), -(-columns // PANEL)
        chunks = whole * -(-group // CHUNK) + -(-rest // CHUNK)
        shapes = (panels, chunks, PANEL), (panels, -(-length // group), PANEL)
        if (tuple(words.shape), tuple(scales.shape)) != shapes:
            raise ValueError(
                f"{self._path}: {name} has words {tuple(words.shape)} and scales {tuple(scales.shape)}: its shape"
                f" {columns, length} and group {group} need {shapes[0]} and {shapes[1]}"
            )
        self._check_values(name, words, (words & (words >> 1)) & _ZEROS, scales)  # the code 3
        return words, scales

    def _check_values(self, name: str, words: Tensor, wrong: Tensor, scales: Tensor) -> None:
        if wrong.any() or not torch.isfinite(scales).all():
            raise ValueError(f"{self._path}: {name} is damaged: a field is not a trit, or a scale is not finite")

    def _part(self, name: str, dtypes: tuple[torch.dtype, ...]) -> Tensor:
        tensor = self._file.get_tensor(name)
        if tensor.dtype not in dtypes:
            raise ValueError(f"{self._path}: {name} is {tensor.dtype}: it must be {' or '.join(map(str, dtypes))}")
        return tensor


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size} bytes: it is not what `tclip export --to torch` writes")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or any(config.get(key) != value for key, value in FORMAT.items()):
            raise ValueError(f"it must have {FORMAT}")
        for name, entry in config["packed"].items():
            numbers = (*entry["shape"], entry["group"])
            if len(numbers) != 3 or not all(type(number) is int and 0 < number < 2**31 for number in numbers):
                raise ValueError(f"packed {name!r:.80} needs a shape of two positive integers, and a group")
        if not isinstance(config["model_cfg"], dict):
            raise ValueError("model_cfg is not an object")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not that of an export of this version: {error!s:.200}") from None
    return config
