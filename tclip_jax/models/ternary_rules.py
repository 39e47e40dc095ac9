"""Selection of the ternary parameters: a list of (regex, quantizer) pairs, matched against parameter paths."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from tclip_jax.ternary import Quantizer

TernaryRules = tuple[tuple[str, Quantizer], ...]

# Those of the blocks, and of SigLIP's attention pooling.
MLP = r"(image|text)/(blocks|pool)/mlp/(fc1|fc2)/kernel"
ATTENTION = r"(image|text)/(blocks|pool)/attention/(qkv|q|kv|out)/kernel"
TOKEN_EMBEDDING = r"text/token_embedding/embedding"
PATCH_EMBEDDING = r"image/patch_embedding/kernel"

# The only parameters that can be ternary: weights of Dense and Embedding layers, and the patch embedding. A model has
# attention pooling, a projection, or both.
TERNARIZABLE = (
    TOKEN_EMBEDDING,
    PATCH_EMBEDDING,
    *(
        f"{tower}/{layer}/kernel"
        for tower in ("image", "text")
        for layer in ("blocks/attention/qkv", "blocks/attention/out", "blocks/mlp/fc1", "blocks/mlp/fc2", "projection")
    ),
    *(f"image/pool/{layer}/kernel" for layer in ("attention/q", "attention/kv", "attention/out", "mlp/fc1", "mlp/fc2")),
)

# In Q-ALL the patch embedding, final projections, class and position embeddings, LayerNorm and biases stay float.
TERNARY_SETS: dict[str, tuple[str, ...]] = {
    "none": (),
    "Q-FFN": (MLP,),
    "Q-ALL": (MLP, ATTENTION, TOKEN_EMBEDDING),
}


def ternary_rules(which: str | Sequence[tuple[str, Quantizer]], quantizer: Quantizer) -> TernaryRules:
    """Create the rules of a named set, or check a list of rules. The first rule that matches a parameter applies.

    Args:
      which: a name in `TERNARY_SETS`, or a list of (regex, quantizer) pairs.
      quantizer: the quantizer of a named set; a list has its own.

    Returns:
      (regex, quantizer) pairs.

    Raises:
      ValueError: there is no such set, or a regex is invalid or matches no parameter that can be ternary.
    """
    if isinstance(which, str):
        if which not in TERNARY_SETS:
            sets = ", ".join(TERNARY_SETS)
            raise ValueError(f"no ternary set {which!r}: there are {sets}, or a list of (regex, quantizer)")
        return tuple((pattern, quantizer) for pattern in TERNARY_SETS[which])
    for pattern, _ in which:
        try:
            matched = any(re.fullmatch(pattern, path) for path in TERNARIZABLE)
        except re.error as error:
            raise ValueError(f"ternary rule {pattern!r} is not a regular expression: {error}") from None
        if not matched:
            raise ValueError(f"ternary rule {pattern!r} matches none of {', '.join(TERNARIZABLE)}")
    return tuple((pattern, quantizer) for pattern, quantizer in which)


def find_quantizer(path: str, rules: TernaryRules) -> Quantizer | None:
    """Return the quantizer of the first rule whose regex matches the whole path; None for a float parameter."""
    return next((quantizer for pattern, quantizer in rules if re.fullmatch(pattern, path)), None)


def is_learned_scale(path: str) -> bool:
    """Whether the path is that of a learned scale: "…/kernel_scale" beside "…/kernel"."""
    return path.endswith("_scale") and path.removesuffix("_scale") in TERNARIZABLE


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in which a weight is quantized and packed.

    The patch embedding's (h, w, C, N) becomes (h · w · C, N), with inputs in the order of `patchify`: rows, columns,
    channels. Other shapes stay.
    """
    return (math.prod(shape[:3]), shape[3]) if len(shape) == 4 else shape


def input_axis(path: str) -> int:
    """Return the axis along which groups of weights share a scale: −1 for an embedding table, −2 for a kernel."""
    return -1 if path.split("/")[-1] == "embedding" else -2
