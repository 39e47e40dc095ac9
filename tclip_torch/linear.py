"""Layers whose ternary weights stay packed at two bits, over one operator: the C++ kernel on CPUs, PyTorch elsewhere.

Layout of a weight (K inputs, N outputs): 32-bit words (panels, chunks, 32). A panel is 32 outputs, a chunk 16 inputs;
bits 8b + 2s and 8b + 2s + 1 of a word are trit + 1 of input 4s + b of its chunk. Each group of inputs that shares a
scale is padded to whole chunks. Scales: (panels, groups, 32), float32 or bfloat16.
"""

import ctypes
import functools
import os
import pathlib
import warnings

import torch
from torch import Tensor, nn

ACTIVATIONS = ("A32", "A16", "A8")
PANEL, CHUNK = 32, 16
FLOATS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}  # dtypes of scales -> integers of their size

# Where products of 16-bit integers have twice the rate of float32 ones.
_FAST_A16 = ("avx512_vnni", "avx_vnni", "avx2")
_LIBRARY = pathlib.Path(__file__).parent / "native" / "libtclip_torch.so"
_SYMBOL = "TclipLinear1"  # of native/plain.cc; another number takes other arguments


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """Load the C++ kernel, once. Without it, warn that PyTorch multiplies, and return None.

    The environment variable TCLIP_TORCH_LIBRARY is the path of a library to use instead of the installed one.
    """
    path = os.environ.get("TCLIP_TORCH_LIBRARY") or str(_LIBRARY)
    try:
        library = ctypes.CDLL(path)
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        linear = getattr(library, _SYMBOL)
    except (OSError, AttributeError) as error:
        absent = path == str(_LIBRARY) and not _LIBRARY.exists()
        reason = "it was not built, which needs pip install and a C++17 compiler" if absent else error
        warnings.warn(f"tclip_torch has no native kernel, PyTorch multiplies instead, slowly: {reason}", stacklevel=2)
        return None
    linear.restype = ctypes.c_char_p
    linear.argtypes = [pointer, pointer, *[number] * 4, *[pointer, number] * 2, number, pointer, *[number] * 4]
    library.TclipInstructions.restype = ctypes.c_char_p
    library.TclipInstructions.argtypes = [number]
    return library


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Instruction sets of the kernel, best first, "" for one that this CPU lacks; empty without the kernel."""
    library = kernel()
    names: list[str] = []
    while library and (name := library.TclipInstructions(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


def best_instructions() -> str:
    """The instruction set of the products; "" without the kernel."""
    return next(filter(None, instruction_sets()), "")


def default_activations() -> str:
    """The activations of CPUs by default, as in tclip_jax: "A16" if the kernel has AVX2 or more, otherwise "A32"."""
    return "A16" if best_instructions() in _FAST_A16 else "A32"


@torch.library.custom_op(
    "tclip_torch::linear",
    mutates_args=(),
    schema="(Tensor x, Tensor words, Tensor scales, Tensor? bias, int columns, int group, str activations) -> Tensor",
)
def linear(
    x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None, columns: int, group: int, activations: str
) -> Tensor:
    """Multiply by a packed weight: x · ŵ + bias, accumulated in float32. It has no gradient.

    Args:
      x: float32 or bfloat16 (..., K).
      words: packed trits, int32 (panels, chunks, 32).
      scales: float32 or bfloat16 (panels, groups, 32).
      bias: float32 (columns), or None.
      columns: N.
      group: number of consecutive inputs that share a scale.
      activations: "A32" multiplies `x` as it is. "A16" and "A8" first round each token to int16 or int8, with the scale
        max|x| / 32767 or / 127.

    Returns:
      (..., columns) in the dtype of `x`.

    Raises:
      TypeError: `x` has another dtype.
    """
    if x.dtype not in FLOATS:
        raise TypeError(f"activations are {x.dtype}: packed layers take torch.float32 and torch.bfloat16")
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    library = kernel() if x.device.type == "cpu" else None
    if library is None:
        y = multiply(rows, dequantize(words, scales, rows.shape[1], columns, group), activations)
        y = (y if bias is None else y + bias).to(x.dtype)
    else:
        y = rows.new_empty(len(rows), columns)
        wrong = library.TclipLinear1(
            rows.data_ptr(),
            y.data_ptr(),
            x.dtype == torch.bfloat16,
            *rows.shape,
            columns,
            words.data_ptr(),
            words.numel(),
            scales.data_ptr(),
            scales.numel(),
            scales.dtype == torch.bfloat16,
            None if bias is None else bias.data_ptr(),
            group,
            ACTIVATIONS.index(activations),
            instruction_sets().index(best_instructions()),
            torch.get_num_threads(),
        )
        if wrong:
            raise RuntimeError(f"tclip_torch::linear: {wrong.decode()}")
    return y.reshape(*x.shape[:-1], columns)


@linear.register_fake
def _(
    x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None, columns: int, group: int, activations: str
) -> Tensor:
    return x.new_empty(*x.shape[:-1], columns)


def dequantize(words: Tensor, scales: Tensor, length: int, columns: int, group: int) -> Tensor:
    """Unpack the weight (length, columns): float32."""
    shifts = torch.tensor([8 * (k % 4) + 2 * (k // 4) for k in range(CHUNK)], dtype=torch.int32, device=words.device)
    codes = words[:, :, None, :] >> shifts[:, None] & 3  # (panels, chunks, 16, 32)
    trits = codes.permute(1, 2, 0, 3).reshape(-1, len(words) * PANEL)[:, :columns] - 1
    k = torch.arange(length, device=words.device)
    levels = scales.permute(1, 0, 2).reshape(-1, len(words) * PANEL)[:, :columns].float()
    # The packed place of each input: groups are padded to whole chunks.
    return trits[k // group * (-(-group // CHUNK) * CHUNK) + k % group] * levels[k // group]


def multiply(x: Tensor, dense: Tensor, activations: str) -> Tensor:
    """Multiply by a dense float32 weight in float32; with A16 and A8, round each token of `x` first, as the kernel."""
    x = x.float()
    if activations == "A32":
        return x @ dense
    largest = x.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    # A tensor, as PyTorch divides a number by a tensor in two roundings.
    most = torch.full_like(largest, 32767 if activations == "A16" else 127)
    return (torch.round(x * (most / largest)) @ dense) * (largest / most)


def take_columns(packed: Tensor, start: int, stop: int, padding: float) -> Tensor:
    """Copy outputs `start` to `stop` of words or scales (panels, X, 32), and fill the last panel with `padding`."""
    columns = packed.permute(1, 0, 2).reshape(packed.shape[1], -1)[:, start:stop]
    padded = nn.functional.pad(columns, (0, -columns.shape[1] % PANEL), value=padding)
    return padded.reshape(packed.shape[1], -1, PANEL).permute(1, 0, 2).contiguous()


class PackedLinear(nn.Module):
    """A linear layer with a packed weight, for inference: x · ŵ + bias.

    Scales are buffers of integers, so that `.to(dtype)`, `.half()` and `.bfloat16()` leave their values alone.

    Attributes:
      in_features: K.
      out_features: N.
      activations: as in the operator `linear`.
    """

    words: Tensor
    scales: Tensor

    def __init__(
        self, words: Tensor, scales: Tensor, bias: Tensor | None, shape: tuple[int, int], group: int, activations: str
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.group, self.activations = group, activations
        self._scale_dtype = scales.dtype
        self.register_buffer("words", words)
        self.register_buffer("scales", scales.view(FLOATS[scales.dtype]))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def int8_original_dtype(self) -> torch.dtype:
        """What open_clip asks of layers with other weights than floats: the dtype of the activations."""
        return torch.float32 if self.bias is None else self.bias.dtype

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x is {tuple(x.shape)}: its last axis must be the {self.in_features} inputs of the layer")
        bias = None if self.bias is None else self.bias.float()
        scales = self.scales.view(self._scale_dtype)
        return linear(x, self.words, scales, bias, self.out_features, self.group, self.activations)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group={self.group}, activations={self.activations!r}"


class PackedEmbedding(nn.Module):
    """An embedding table whose rows have four trits to a byte and a scale for each group; ids (...) give (..., W).

    The result has the dtype to which the module was moved, at first float32.
    """

    rows: Tensor
    scales: Tensor
    like: Tensor

    def __init__(self, rows: Tensor, scales: Tensor, width: int, group: int) -> None:
        super().__init__()
        self.embedding_dim, self.num_embeddings, self.group = width, len(rows), group
        self._scale_dtype = scales.dtype
        self.register_buffer("rows", rows)
        self.register_buffer("scales", scales.view(FLOATS[scales.dtype]))
        self.register_buffer("like", torch.empty(0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        packed = nn.functional.embedding(ids, self.rows)
        # Fields of two bits in two's complement, the first trit lowest.
        fields = packed[..., None] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device) & 3
        trits = (fields.to(torch.int8) ^ 2).flatten(-2)[..., : self.embedding_dim] - 2
        scales = self.scales.expand(self.num_embeddings, -1)
        levels = nn.functional.embedding(ids, scales).view(self._scale_dtype).float()
        if levels.shape[-1] > 1:
            levels = levels[..., torch.arange(self.embedding_dim, device=ids.device) // self.group]
        return (trits * levels).to(self.like.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, group={self.group}"


class PackedAttention(nn.Module):
    """Multi-head self-attention, in the place of nn.MultiheadAttention, with packed or float projections.

    Attributes:
      in_proj: D -> 3 · D, queries, keys and values.
      out_proj: D -> D.
      heads: number of heads.
      batch_first: whether inputs are (N, T, D) rather than (T, N, D).
    """

    def __init__(self, in_proj: nn.Module, out_proj: nn.Module, heads: int, batch_first: bool = True) -> None:
        super().__init__()
        self.in_proj, self.out_proj, self.num_heads, self.batch_first = in_proj, out_proj, heads, batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend as nn.MultiheadAttention; a mask of bools is True where a token must not attend."""
        if key is not query or value is not query or need_weights:
            raise ValueError("packed attention is self-attention without weights: query, key and value must be one")
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask
        x = query if self.batch_first else query.transpose(0, 1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.in_proj(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal)
        x = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return (x if self.batch_first else x.transpose(0, 1)), None
