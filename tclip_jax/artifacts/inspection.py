"""Measure an artifact: its bytes by kind and the zeros in its trits, as JSON, text tables and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tclip_jax.artifacts.files import TERNARY_FILE, WEIGHT_FILES
from tclip_jax.artifacts.format import read_artifact
from tclip_jax.artifacts.pack import flatten
from tclip_jax.artifacts.safetensors import read_safetensors
from tclip_jax.models.ternary_rules import TOKEN_EMBEDDING
from tclip_jax.pages import aligned, dotted
from tclip_jax.ternary import Quantizer, TernaryTensor


def ternary_share(params: Mapping[str, Any], *, token_embedding: bool = True) -> float:
    """Return ternary parameters / all parameters, 0 to 1; 0 for an empty tree.

    Args:
      params: packed parameter tree.
      token_embedding: include the token embedding in both counts.
    """
    leaves = _leaves(params, token_embedding)
    ternary = sum(math.prod(leaf.shape) for leaf in leaves if isinstance(leaf, TernaryTensor))
    return ternary / max(sum(math.prod(leaf.shape) for leaf in leaves), 1)


def zero_share(params: Mapping[str, Any], *, token_embedding: bool = True) -> float:
    """Return zero trits / all trits (the sparsity), 0 to 1; 0 for a tree without trits.

    Args:
      params: packed parameter tree.
      token_embedding: include the trits of the token embedding.
    """
    trits = [np.asarray(leaf.trits) for leaf in _leaves(params, token_embedding) if isinstance(leaf, TernaryTensor)]
    return sum(each.size - np.count_nonzero(each) for each in trits) / max(sum(each.size for each in trits), 1)


def theoretical_compression(share: float) -> float:
    """Return 32 / ((1 − p)·32 + p·1.58) for a ternary share p; 16.98 at p = 0.99, as in arXiv 2510.21879."""
    return 32 / ((1 - share) * 32 + share * 1.58)


def float32_bytes(params: Mapping[str, Any]) -> int:
    """Return the size in bytes of all parameters in float32."""
    return 4 * sum(math.prod(leaf.shape) for leaf in _leaves(params, True))


def weight_bytes(folder: epath.PathLike) -> int:
    """Return the size in bytes of an artifact's two weight files."""
    return sum((epath.Path(folder) / file).stat().length for file in WEIGHT_FILES.values())


def folder_bytes(folder: epath.PathLike) -> int:
    """Return the size in bytes of all files of an artifact, with the tokenizer and tclip.json."""
    return sum(path.stat().length for path in epath.Path(folder).iterdir())


def compression_real(params: Mapping[str, Any], folder: epath.PathLike) -> float:
    """Return the size of the parameters in float32 / the size of the artifact's weight files."""
    return float32_bytes(params) / weight_bytes(folder)


def _leaves(params: Mapping[str, Any], token_embedding: bool) -> list[Any]:
    return [leaf for path, leaf in flatten(params).items() if token_embedding or path != TOKEN_EMBEDDING]


_PARTS = ("#3b6fb6", "#8fb3de", "#d1603d")
_WEIGHTS = {"qkv": "#3b6fb6", "out": "#2a9d8f", "fc1": "#d1603d", "fc2": "#e9a03b"}


def plot_inspection(inspection: Mapping[str, Any]) -> Figure:
    """Return a figure of the result of `inspect_artifact`: sizes on the left, zeros on the right."""
    figure = Figure(figsize=(13, 5), layout="constrained", dpi=110)
    sizes, zeros = figure.subplots(1, 2, width_ratios=(1, 1.9))
    plot_sizes(sizes, inspection)
    plot_zeros(zeros, inspection)
    return figure


def plot_sizes(axes: Axes, inspection: Mapping[str, Any]) -> None:
    """Draw a bar for each part of the weight files, in MB (10⁶ bytes)."""
    parts, total = inspection["bytes"], inspection["weight_bytes"]
    bars = axes.barh(list(parts), [size / 1e6 for size in parts.values()], color=_PARTS, height=0.6)
    axes.bar_label(bars, [f" {size / 1e6:.3g} MB, {size / total:.0%}" for size in parts.values()], padding=2)
    axes.set(
        title=f"weight files: {total / 1e6:.2f} MB, {inspection['compression_real']:.2f}x below float32",
        xlabel=f"MB; {inspection['bits_per_trit']:.3f} bits a trit, entropy {inspection['entropy']:.3f}",
        xlim=(0, 1.45 * max(parts.values()) / 1e6),
    )
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def plot_zeros(axes: Axes, inspection: Mapping[str, Any]) -> None:
    """Draw the share of zeros over the layers, a line for each weight; weights outside the blocks are horizontal."""
    for path in dict.fromkeys(row["path"] for row in inspection["layers"]):
        rows, name = [row for row in inspection["layers"] if row["path"] == path], weight_name(path)
        style = "-" if name.startswith("image") else "--"
        shares = [100 * row["zeros"] for row in rows]
        if rows[0]["layer"] is None:
            axes.axhline(shares[0], color="#777777", linestyle=":", label=name)
        else:
            axes.plot(shares, style, marker="o", markersize=4, color=_WEIGHTS[name.split()[-1]], label=name)
    axes.set(title=f"zeros: {inspection['zeros']:.1%} of all trits", xlabel="layer", ylabel="% of the layer's trits")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.margins(y=0.15)
    # Show a range of at least 4 percentage points, so that random variation looks small.
    low, high = axes.get_ylim()
    missing = max(4 - (high - low), 0) / 2
    axes.set_ylim(low - missing, high + missing)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def inspect_artifact(folder: epath.PathLike) -> dict[str, Any]:
    """Measure an artifact; shares are fractions, 0 to 1.

    Returns:
      A JSON object. `bytes` splits the weight files into trits, scales, and float parameters with headers. `layers` has
      a row for each ternary weight of each layer. `entropy`, in bits a trit, assumes independent trits with the shares
      of −1, 0 and +1 in their weight and layer; `bits_per_trit` is the size on disk.

    Raises:
      ArtifactError: the artifact cannot be read.
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


def inspection_text(inspection: Mapping[str, Any]) -> str:
    """Return the result of `inspect_artifact` as aligned tables for a terminal, shares in per cent."""
    total, bits, entropy = inspection["weight_bytes"], inspection["bits_per_trit"], inspection["entropy"]
    sizes = [(name, f"{size:,} B", f"{size / total:.1%}") for name, size in inspection["bytes"].items()]
    sizes += [
        (
            "weight files",
            f"{total:,} B",
            f"{inspection['compression_real']:.2f}x below float32 ({inspection['float32_bytes']:,} B)",
        ),
        ("whole folder", f"{inspection['folder_bytes']:,} B", "with tokenizer and configuration"),
    ]
    without = f"{inspection['ternary_share_without_token_embedding']:.2%} without the token embedding"
    quantizers = dict.fromkeys(Quantizer(**fields).description for _, fields in inspection["ternary"])
    facts = [
        ("quantizer", ", ".join(quantizers) or "none", ""),
        ("parameters", f"{inspection['parameters']:,}", ""),
        ("ternary", f"{inspection['ternary_share']:.2%}", without),
        (
            "zeros",
            f"{inspection['zeros']:.1%}",
            f"{inspection['zeros_without_token_embedding']:.1%} without the token embedding",
        ),
    ]
    if entropy:
        facts.append(("bits a trit", f"{bits:.3f}", f"entropy {entropy:.3f}: {bits / entropy - 1:+.1%}"))
    if bits:
        why = "by the paper's formula: 1.58 bits a trit, the rest float32; the files store both in fewer bits"
        facts.append(("compression", f"{inspection['compression_theoretical']:.2f}x", why))
    parts = [_left_last(sizes), _left_last(facts)]
    if inspection["layers"]:
        parts.append("\n".join(["zeros, %", *aligned(_zero_rows(inspection["layers"]))]))
    for name in ("figures", "provenance"):
        if inspection[name]:
            parts.append("\n".join([name, *(f"  {key}: {value}" for key, value in dotted(inspection[name]))]))
    return "\n\n".join(parts)


def weight_name(path: str) -> str:
    """Return the short name of a weight: "image qkv" for image/blocks/attention/qkv/kernel."""
    tower, *_, name, _ = path.split("/")
    return f"{tower} {name.replace('_', ' ')}"


def _zero_rows(layers: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return a line for each layer, with a column for each weight, and a line for each weight outside the blocks."""
    stacked = dict.fromkeys(row["path"] for row in layers if row["layer"] is not None)
    zeros = {(row["path"], row["layer"]): f"{100 * row['zeros']:.1f}" for row in layers}
    depth = max((row["layer"] + 1 for row in layers if row["layer"] is not None), default=0)
    lines = [("layer", *map(weight_name, stacked))] if stacked else []
    lines += [(str(layer), *(zeros.get((path, layer), "") for path in stacked)) for layer in range(depth)]
    alone = [(weight_name(path), share) for (path, layer), share in zeros.items() if layer is None]
    return lines + [(*line, *[""] * (len(stacked) - 1)) for line in alone]


def _left_last(rows: Sequence[Sequence[str]]) -> str:
    """Align rows to the right, except the last column, which is text and is aligned to the left."""
    lines = aligned([row[:-1] for row in rows])
    return "\n".join(f"{line}  {row[-1]}".rstrip() for line, row in zip(lines, rows, strict=True))
