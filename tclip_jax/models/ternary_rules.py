"""Which parameters are ternary: one list of (regex, quantizer), matched on parameter paths."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from tclip_jax.ternary import Quantizer

TernaryRules = tuple[tuple[str, Quantizer], ...]

MLP = r"(image|text)/blocks/mlp/(fc1|fc2)/kernel"
ATTENTION = r"(image|text)/blocks/attention/(qkv|out)/kernel"
TOKEN_EMBEDDING = r"text/token_embedding/embedding"
PATCH_EMBEDDING = r"image/patch_embedding/kernel"

# The weights of the models' Dense and Embedding layers and the patch embedding: nothing else can be ternary.
TERNARIZABLE = (
    TOKEN_EMBEDDING,
    PATCH_EMBEDDING,
    *(
        f"{tower}/{layer}/kernel"
        for tower in ("image", "text")
        for layer in ("blocks/attention/qkv", "blocks/attention/out", "blocks/mlp/fc1", "blocks/mlp/fc2", "projection")
    ),
)

# Q-ALL leaves the patch embedding, output projections, class and position embeddings, LayerNorm and biases in float.
TERNARY_SETS: dict[str, tuple[str, ...]] = {
    "none": (),
    "Q-FFN": (MLP,),
    "Q-ALL": (MLP, ATTENTION, TOKEN_EMBEDDING),
}


def ternary_rules(which: str | Sequence[tuple[str, Quantizer]], quantizer: Quantizer) -> TernaryRules:
    """The rules of a named set with one quantizer, or a list of (regex, quantizer) as it is; first match wins.

    Raises:
      ValueError: no set of that name, a regex that does not compile, or one that matches nothing.
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
    """The quantizer of the first rule whose regex matches the whole path, or None for a float parameter."""
    return next((quantizer for pattern, quantizer in rules if re.fullmatch(pattern, path)), None)


def is_learned_scale(path: str) -> bool:
    """Whether this is the learned scale beside a weight: "…/kernel_scale" of "…/kernel"."""
    return path.endswith("_scale") and path.removesuffix("_scale") in TERNARIZABLE


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which a weight is quantized and packed: the patch embedding's (h, w, C, N) is (h · w · C, N).

    Its inputs are thereby in the order of `patchify`: rows, columns, channels.
    """
    return (math.prod(shape[:3]), shape[3]) if len(shape) == 4 else shape


def input_axis(path: str) -> int:
    """The axis that groups run along: within the rows of an embedding table, down the columns of a kernel."""
    return -1 if path.split("/")[-1] == "embedding" else -2
