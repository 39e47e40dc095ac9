"""How much of a model is ternary, how much of that is zero, and what it saves. Shares are fractions in 0–1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from tclip_jax.artifacts.files import WEIGHT_FILES
from tclip_jax.artifacts.pack import flatten
from tclip_jax.models.ternary_rules import TOKEN_EMBEDDING
from tclip_jax.ternary import TernaryTensor


def ternary_share(params: Mapping[str, Any], *, token_embedding: bool = True) -> float:
    """Ternary parameters / all parameters, without the token embedding in either if asked; 0 for no parameters."""
    leaves = _leaves(params, token_embedding)
    ternary = sum(math.prod(leaf.shape) for leaf in leaves if isinstance(leaf, TernaryTensor))
    return ternary / max(sum(math.prod(leaf.shape) for leaf in leaves), 1)


def zero_share(params: Mapping[str, Any], *, token_embedding: bool = True) -> float:
    """Zero trits / all trits (the sparsity), without those of the token embedding if asked; 0 for no trits."""
    trits = [np.asarray(leaf.trits) for leaf in _leaves(params, token_embedding) if isinstance(leaf, TernaryTensor)]
    return sum(each.size - np.count_nonzero(each) for each in trits) / max(sum(each.size for each in trits), 1)


def theoretical_compression(share: float) -> float:
    """32 / ((1 − p)·32 + p·1.58) for a ternary share p: 16.98 at 0.99, the figure of arXiv 2510.21879."""
    return 32 / ((1 - share) * 32 + share * 1.58)


def float32_bytes(params: Mapping[str, Any]) -> int:
    """Bytes of all parameters in float32."""
    return 4 * sum(math.prod(leaf.shape) for leaf in _leaves(params, True))


def weight_bytes(folder: epath.PathLike) -> int:
    """Bytes of an artifact's two weight files."""
    return sum((epath.Path(folder) / file).stat().length for file in WEIGHT_FILES.values())


def folder_bytes(folder: epath.PathLike) -> int:
    """Bytes of all files of an artifact, tokenizer and tclip.json included."""
    return sum(path.stat().length for path in epath.Path(folder).iterdir())


def compression_real(params: Mapping[str, Any], folder: epath.PathLike) -> float:
    """Bytes of the parameters in float32 / bytes of the artifact's weight files."""
    return float32_bytes(params) / weight_bytes(folder)


def _leaves(params: Mapping[str, Any], token_embedding: bool) -> list[Any]:
    return [leaf for path, leaf in flatten(params).items() if token_embedding or path != TOKEN_EMBEDDING]
