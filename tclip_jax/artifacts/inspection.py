"""What an artifact consists of: where its bytes go, how many of its trits are zero, and what coding them cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from tclip_jax.artifacts.files import TERNARY_FILE
from tclip_jax.artifacts.format import read_artifact
from tclip_jax.artifacts.pack import flatten
from tclip_jax.artifacts.safetensors_file import read_safetensors
from tclip_jax.artifacts.sizes import (
    compression_real,
    float32_bytes,
    folder_bytes,
    ternary_share,
    theoretical_compression,
    weight_bytes,
    zero_share,
)
from tclip_jax.pages import aligned, dotted
from tclip_jax.ternary import TernaryTensor


def inspect_artifact(folder: epath.PathLike) -> dict[str, Any]:
    """The figures of an artifact as JSON; shares are fractions in 0–1.

    `bytes` says what the weight files spend on trits, scales, float parameters and their headers; `layers` has a row
    for each ternary weight of each layer. `entropy` is that of independent trits with the shares of −1, 0, +1 of their
    own weight and layer, in bits; `bits_per_trit` what they take on disk.

    Raises:
      ArtifactError: an artifact that cannot be read.
    """
    artifact, folder = read_artifact(folder), epath.Path(folder)
    leaves = flatten(artifact.params)
    ternary = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, TernaryTensor)}
    stored = {name: array.shape[0] for name, array in read_safetensors(folder / TERNARY_FILE).items()}
    trit_bytes, scale_bytes = (sum(stored[path + end] for path in ternary) for end in (".trits", ".scale"))
    rows = [row for path, leaf in ternary.items() for row in _rows(path, leaf)]
    count, weights = sum(row["trits"] for row in rows), weight_bytes(folder)
    share = ternary_share(artifact.params)
    rest = weights - trit_bytes - scale_bytes
    return {
        "format_version": artifact.manifest["format_version"],
        "model_cfg": artifact.manifest["model_cfg"],
        "preprocess_cfg": artifact.manifest["preprocess_cfg"],
        "parameters": sum(math.prod(leaf.shape) for leaf in leaves.values()),
        "ternary_share": share,
        "ternary_share_without_token_embedding": ternary_share(artifact.params, token_embedding=False),
        "zeros": zero_share(artifact.params),
        "zeros_without_token_embedding": zero_share(artifact.params, token_embedding=False),
        "bits_per_trit": 8 * trit_bytes / max(count, 1),
        "entropy": sum(row["entropy"] * row["trits"] for row in rows) / max(count, 1),
        "float32_bytes": float32_bytes(artifact.params),
        "weight_bytes": weights,
        "folder_bytes": folder_bytes(folder),
        "compression_real": compression_real(artifact.params, folder),
        "compression_theoretical": theoretical_compression(share),
        "bytes": {"trits": trit_bytes, "scales": scale_bytes, "float parameters, headers": rest},
        "layers": rows,
        "ternary": artifact.manifest["ternary"],
        "provenance": artifact.manifest.get("provenance", {}),
        "figures": artifact.manifest.get("figures", {}),
    }


def _rows(path: str, leaf: TernaryTensor) -> list[dict[str, Any]]:
    stacked = len(leaf.shape) == 3
    rows = []
    for layer, trits in enumerate(np.asarray(leaf.trits).reshape(-1, *leaf.shape[-2:])):
        minus, zeros, plus = shares = (np.bincount((trits + 1).ravel(), minlength=3) / trits.size).tolist()
        entropy = -sum(share * math.log2(share) for share in shares if share)
        row = {"path": path, "layer": layer if stacked else None, "trits": trits.size, "group": leaf.group}
        rows.append(row | {"minus": minus, "zeros": zeros, "plus": plus, "entropy": entropy})
    return rows


def inspection_text(found: Mapping[str, Any]) -> str:
    """The figures as aligned tables for a terminal, shares in per cent."""
    total, bits, entropy = found["weight_bytes"], found["bits_per_trit"], found["entropy"]
    sizes = [(name, f"{size:,} B", f"{size / total:.1%}") for name, size in found["bytes"].items()]
    sizes += [
        (
            "weight files",
            f"{total:,} B",
            f"{found['compression_real']:.2f}x below float32 ({found['float32_bytes']:,} B)",
        ),
        ("whole folder", f"{found['folder_bytes']:,} B", "with tokenizer and configuration"),
    ]
    without = f"{found['ternary_share_without_token_embedding']:.2%} without the token embedding"
    facts = [
        ("parameters", f"{found['parameters']:,}", ""),
        ("ternary", f"{found['ternary_share']:.2%}", without),
        ("zeros", f"{found['zeros']:.1%}", f"{found['zeros_without_token_embedding']:.1%} without the token embedding"),
    ]
    if entropy:
        facts.append(("bits a trit", f"{bits:.3f}", f"entropy {entropy:.3f}: {bits / entropy - 1:+.1%}"))
    if bits:
        facts.append(("theoretical", f"{found['compression_theoretical']:.2f}x", "1.58 bits a trit, the rest float32"))
    parts = [_words(sizes), _words(facts)]
    if found["layers"]:
        parts.append("\n".join(["zeros, %", *aligned(_zero_rows(found["layers"]))]))
    for name in ("figures", "provenance"):
        if found[name]:
            parts.append("\n".join([name, *(f"  {key}: {value}" for key, value in dotted(found[name]))]))
    return "\n\n".join(parts)


def weight_name(path: str) -> str:
    """ "image qkv" of image/blocks/attention/qkv/kernel."""
    tower, *_, name, _ = path.split("/")
    return f"{tower} {name.replace('_', ' ')}"


def _zero_rows(layers: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each layer, a column for each weight of it, and a line for each weight that belongs to no layer."""
    stacked = dict.fromkeys(row["path"] for row in layers if row["layer"] is not None)
    zeros = {(row["path"], row["layer"]): f"{100 * row['zeros']:.1f}" for row in layers}
    depth = max((row["layer"] + 1 for row in layers if row["layer"] is not None), default=0)
    lines = [("layer", *map(weight_name, stacked))] if stacked else []
    lines += [(str(layer), *(zeros.get((path, layer), "") for path in stacked)) for layer in range(depth)]
    alone = [(weight_name(path), share) for (path, layer), share in zeros.items() if layer is None]
    return lines + [(*line, *[""] * (len(stacked) - 1)) for line in alone]


def _words(rows: Sequence[Sequence[str]]) -> str:
    """Aligned lines whose last column is words, to the left."""
    lines = aligned([row[:-1] for row in rows])
    return "\n".join(f"{line}  {row[-1]}".rstrip() for line, row in zip(lines, rows, strict=True))
