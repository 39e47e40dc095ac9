"""Measure an artifact: its bytes by kind and the zeros in its trits, as JSON, text tables and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tclip_jax.artifacts.coding import array_names
from tclip_jax.artifacts.files import WEIGHT_FILES
from tclip_jax.artifacts.format import read_artifact
from tclip_jax.artifacts.pack import flatten, repack_leaf
from tclip_jax.artifacts.safetensors import read_safetensors
from tclip_jax.models.ternary_rules import TOKEN_EMBEDDING
from tclip_jax.pages import aligned, dotted
from tclip_jax.ternary import QuantizedTensor, Quantizer, TernaryTensor, UniformTensor


def ternary_share(params: Mapping[str, Any], *, token_embedding: bool = True) -> float:
    """Return ternary parameters / all parameters, 0 to 1; 0 for an empty tree.

    Args:
      params: packed parameter tree.
      token_embedding: include the token embedding in both counts.
    """
    return _share_of(TernaryTensor, params, token_embedding)


def uniform_share(params: Mapping[str, Any], *, token_embedding: bool = True) -> float:
    """Return parameters of 4 or 8 bits / all parameters, 0 to 1; as `ternary_share`."""
    return _share_of(UniformTensor, params, token_embedding)


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
    return sum((epath.Path(folder) / file).stat().length for file in WEIGHT_FILES)


def folder_bytes(folder: epath.PathLike) -> int:
    """Return the size in bytes of all files of an artifact, with the tokenizer and tclip.json."""
    return sum(path.stat().length for path in epath.Path(folder).iterdir())


def compression_real(params: Mapping[str, Any], folder: epath.PathLike) -> float:
    """Return the size of the parameters in float32 / the size of the artifact's weight files."""
    return float32_bytes(params) / weight_bytes(folder)


def _share_of(kind: type[QuantizedTensor], params: Mapping[str, Any], token_embedding: bool) -> float:
    leaves = _leaves(params, token_embedding)
    counted = sum(math.prod(leaf.shape) for leaf in leaves if isinstance(leaf, kind))
    return counted / max(sum(math.prod(leaf.shape) for leaf in leaves), 1)


def _leaves(params: Mapping[str, Any], token_embedding: bool) -> list[Any]:
    return [leaf for path, leaf in flatten(params).items() if token_embedding or path != TOKEN_EMBEDDING]


_PARTS = {"trits": "#3b6fb6", "integers": "#2a9d8f", "scales": "#8fb3de"}
_REST = "#d1603d"
_WEIGHTS = {"qkv": "#3b6fb6", "out": "#2a9d8f", "fc1": "#d1603d", "fc2": "#e9a03b"}


def plot_inspection(inspection: Mapping[str, Any]) -> Figure:
    """Return a figure of the result of `inspect_artifact`: sizes on the left; zeros on the right, if it has trits."""
    if not inspection["layers"]:
        figure = Figure(figsize=(6.5, 5), layout="constrained", dpi=110)
        plot_sizes(figure.subplots(), inspection)
        return figure
    figure = Figure(figsize=(13, 5), layout="constrained", dpi=110)
    sizes, zeros = figure.subplots(1, 2, width_ratios=(1, 1.9))
    plot_sizes(sizes, inspection)
    plot_zeros(zeros, inspection)
    return figure


def plot_sizes(axes: Axes, inspection: Mapping[str, Any]) -> None:
    """Draw a bar for each part of the weight files, in MB (10⁶ bytes)."""
    total = inspection["weight_bytes"]
    parts = {name: size for name, size in inspection["bytes"].items() if size}
    colours = [_PARTS.get(name, _REST) for name in parts]
    bars = axes.barh(list(parts), [size / 1e6 for size in parts.values()], color=colours, height=0.6)
    axes.bar_label(bars, [f" {size / 1e6:.3g} MB, {size / total:.0%}" for size in parts.values()], padding=2)
    bits = f"; {inspection['bits_per_trit']:.3f} bits a trit, entropy {inspection['entropy']:.3f}"
    axes.set(
        title=f"weight files: {total / 1e6:.2f} MB, {inspection['compression_real']:.2f}x below float32",
        xlabel=f"MB{bits if inspection['layers'] else ''}",
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
      A JSON object. `bytes` splits the weight files into trits, integers of 4 and 8 bits if there are some, scales, and
      float parameters with headers; `parts` into towers, the token embedding, and the rest with headers; `tensors` into
      parameters. `resident_bytes` is what they take in memory, packed for this machine. `layers` has a row for each
      ternary weight of each layer. `entropy`, in bits a trit, assumes independent trits with the shares of −1, 0 and +1
      in their weight and layer; `bits_per_trit` and `bits_per_integer` are sizes on disk. `compression_theoretical` is
      None for a model with integers, for which the paper has no formula.

    Raises:
      ArtifactError: the artifact cannot be read.
    """
    artifact, folder = read_artifact(folder), epath.Path(folder)
    leaves = flatten(artifact.params)
    arrays = {name: array for file in WEIGHT_FILES for name, array in read_safetensors(folder / file).items()}
    stored = {name: array.shape[0] for name, array in arrays.items()}
    trit_bytes, integer_bytes, scale_bytes = (
        sum(size for name, size in stored.items() if name.endswith(end)) for end in (".trits", ".integers", ".scale")
    )
    rows = [row for path, leaf in leaves.items() if isinstance(leaf, TernaryTensor) for row in _rows(path, leaf)]
    integers = sum(math.prod(leaf.shape) for leaf in leaves.values() if isinstance(leaf, UniformTensor))
    count, weights = sum(row["trits"] for row in rows), weight_bytes(folder)
    share = ternary_share(artifact.params)
    sizes = {"trits": trit_bytes} | ({"integers": integer_bytes} if integers else {}) | {"scales": scale_bytes}
    tensors = [
        {
            "path": path,
            "coding": (coding := artifact.manifest["tensors"][path]["coding"]),
            "parameters": math.prod(leaf.shape),
            "bytes": sum(stored[name] for name in array_names(path, coding)),
            "resident_bytes": sum(np.asarray(each).nbytes for each in jax.tree.leaves(repack_leaf(leaf))),
        }
        for path, leaf in leaves.items()
    ]
    return {
        "format_version": artifact.manifest["format_version"],
        "model_cfg": artifact.manifest["model_cfg"],
        "preprocess_cfg": artifact.manifest["preprocess_cfg"],
        "parameters": sum(math.prod(leaf.shape) for leaf in leaves.values()),
        "ternary_share": share,
        "ternary_share_without_token_embedding": ternary_share(artifact.params, token_embedding=False),
        "uniform_share": uniform_share(artifact.params),
        "uniform_share_without_token_embedding": uniform_share(artifact.params, token_embedding=False),
        "zeros": zero_share(artifact.params),
        "zeros_without_token_embedding": zero_share(artifact.params, token_embedding=False),
        "bits_per_trit": 8 * trit_bytes / max(count, 1),
        "bits_per_integer": 8 * integer_bytes / max(integers, 1),
        "entropy": sum(row["entropy"] * row["trits"] for row in rows) / max(count, 1),
        "float32_bytes": float32_bytes(artifact.params),
        "weight_bytes": weights,
        "folder_bytes": folder_bytes(folder),
        "resident_bytes": sum(tensor["resident_bytes"] for tensor in tensors),
        "compression_real": compression_real(artifact.params, folder),
        "compression_theoretical": None if integers else theoretical_compression(share),
        "bytes": sizes | {"float parameters, headers": weights - sum(sizes.values())},
        "parts": _parts(tensors, weights),
        "tensors": tensors,
        "layers": rows,
        "ternary": artifact.manifest["ternary"],
        "provenance": artifact.manifest.get("provenance", {}),
        "figures": artifact.manifest.get("figures", {}),
    }


def _parts(tensors: Sequence[Mapping[str, Any]], weights: int) -> dict[str, dict[str, int]]:
    """Sum the sizes of tensors by tower, the token embedding apart; the rest has what remains of the weight files."""
    keys = ("parameters", "bytes", "resident_bytes")
    names = {TOKEN_EMBEDDING: "token embedding"}
    parts = {name: dict.fromkeys(keys, 0) for name in ("image tower", "text tower", "token embedding", "rest, headers")}
    for tensor in tensors:
        tower = f"{tensor['path'].split('/')[0]} tower"
        name = names.get(tensor["path"], tower if tower in parts else "rest, headers")
        for key in keys:
            parts[name][key] += tensor[key]
    parts["rest, headers"]["bytes"] += weights - sum(part["bytes"] for part in parts.values())
    return parts


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
    sizes = [(name, f"{size:,} B", f"{size / total:.1%}") for name, size in inspection["bytes"].items() if size]
    sizes += [
        (
            "weight files",
            f"{total:,} B",
            f"{inspection['compression_real']:.2f}x below float32 ({inspection['float32_bytes']:,} B)",
        ),
        ("whole folder", f"{inspection['folder_bytes']:,} B", "with tokenizer and configuration"),
    ]
    parts = [("part", "parameters", "in the files", "in memory here")]
    parts += [
        (name, f"{part['parameters']:,}", f"{part['bytes']:,} B", f"{part['resident_bytes']:,} B")
        for name, part in inspection["parts"].items()
    ]
    without = f"{inspection['ternary_share_without_token_embedding']:.2%} without the token embedding"
    quantizers = dict.fromkeys(Quantizer(**fields).description for _, fields in inspection["ternary"])
    facts = [
        ("quantizer", ", ".join(quantizers) or "none", ""),
        ("parameters", f"{inspection['parameters']:,}", ""),
        ("ternary", f"{inspection['ternary_share']:.2%}", without),
    ]
    if inspection["layers"]:
        without = f"{inspection['zeros_without_token_embedding']:.1%} without the token embedding"
        facts.append(("zeros", f"{inspection['zeros']:.1%}", without))
    if inspection["uniform_share"]:
        facts[2:2] = [
            ("4 and 8 bits", f"{inspection['uniform_share']:.2%}", f"{inspection['bits_per_integer']:.3f} bits each")
        ]
    if entropy:
        facts.append(("bits a trit", f"{bits:.3f}", f"entropy {entropy:.3f}: {bits / entropy - 1:+.1%}"))
    if bits and inspection["compression_theoretical"]:
        why = "by the paper's formula: 1.58 bits a trit, the rest float32; the files store both in fewer bits"
        facts.append(("compression", f"{inspection['compression_theoretical']:.2f}x", why))
    blocks = [_left_last(sizes), "\n".join(aligned(parts)), _left_last(facts)]
    if inspection["layers"]:
        blocks.append("\n".join(["zeros, %", *aligned(_zero_rows(inspection["layers"]))]))
    for name in ("figures", "provenance"):
        if inspection[name]:
            blocks.append("\n".join([name, *(f"  {key}: {value}" for key, value in dotted(inspection[name]))]))
    return "\n\n".join(blocks)


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
