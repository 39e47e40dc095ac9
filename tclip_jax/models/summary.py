"""The table of a model's parameters: shape, dtype, sharding, quantizer, and the ternary share."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from tclip_jax.models.ternary_rules import (
    ATTENTION,
    MLP,
    TERNARIZABLE,
    TernaryRules,
    find_quantizer,
    input_axis,
    is_learned_scale,
    matrix_shape,
    ternary_rules,
)
from tclip_jax.parallel.sharding import partition_spec, path_of
from tclip_jax.ternary import Quantizer
from tclip_jax.ternary.quantizers import scale_shape


def parameter_rows(params: Any, rules: TernaryRules, mesh: Mesh | AbstractMesh) -> list[dict[str, Any]]:
    """Describe each parameter by a dict.

    Args:
      params: a parameter tree of arrays or jax.ShapeDtypeStruct.
      rules: (regex, quantizer) pairs that select the ternary parameters.
      mesh: the mesh of the shardings.

    Returns:
      Dicts with path, shape, size, dtype, sharding, `quantizer`, its description or "" for a float parameter, and
      `bits` of a packed weight: 2 for a trit, 4 or 8 of kind "uniform", None for a float.
    """
    rows = []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = path_of(key_path)
        quantizer = find_quantizer(path, rules) if path in TERNARIZABLE else None
        rows.append(
            {
                "path": path,
                "shape": tuple(leaf.shape),
                "size": math.prod(leaf.shape),
                "dtype": str(leaf.dtype),
                "sharding": str(tuple(partition_spec(path, leaf.shape, mesh))),
                "quantizer": quantizer.description if quantizer else "",
                "bits": quantizer.stored_bits if quantizer else None,
            }
        )
    return rows


def parameter_table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as a table for a terminal.

    Totals and the shares of trits and integers, with and without the token embedding, follow below the table.
    """
    columns = ("path", "shape", "size", "dtype", "sharding", "quantizer")
    cells = [columns, *([f"{row[c]:,}" if c == "size" else str(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(
            cell.rjust(w) if c == "size" else cell.ljust(w) for c, cell, w in zip(columns, line, widths, strict=True)
        )
        for line in cells
    ]
    # Learned scales do not count as parameters, as the scales of packed weights do not.
    counted = [row for row in rows if not is_learned_scale(row["path"])]
    lines.insert(1, "  ".join("-" * width for width in widths))
    for name, part in (
        ("all parameters", counted),
        ("without the token embedding", [row for row in counted if "token_embedding" not in row["path"]]),
    ):
        total, counts = sum(row["size"] for row in part), dict.fromkeys((2, 4, 8), 0)
        for row in part:
            counts[row["bits"]] = counts.get(row["bits"], 0) + row["size"]
        shares = [f"ternary {counts[2]:,} ({counts[2] / total:.2%})"]
        shares += [f"{bits} bits {counts[bits]:,} ({counts[bits] / total:.2%})" for bits in (4, 8) if counts[bits]]
        lines.append(f"{name}: {total:,}, of which {', '.join(shares)}")
    return "\n".join(line.rstrip() for line in lines)


def size_rows(params: Any, quantizer: Quantizer) -> list[dict[str, Any]]:
    """Describe the size of a model for several choices of its quantized parameters.

    Args:
      params: a parameter tree of arrays or jax.ShapeDtypeStruct.
      quantizer: the quantizer of these parameters.

    Returns:
      Dicts with the name of the choice as `weights`, the numbers of `parameters` and of `quantized` ones, and the bytes
      of an artifact's arrays before zstd, `float32_bytes` and `float16_bytes` by the dtype of its float parameters.
      Five trits take a byte, or two integers of 4 bits, and a scale two: float16.
    """
    blocks = tuple((pattern, quantizer) for pattern in (MLP, ATTENTION))
    choices = {
        "full precision": (),
        "Q-ALL, token embedding float": blocks,
        "Q-ALL": ternary_rules("Q-ALL", quantizer),
    }
    leaves = [(path_of(key_path), leaf.shape) for key_path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    rows, per_byte = [], 8 // quantizer.bits if quantizer.uniform else 5
    for name, rules in choices.items():
        chosen = [(path, shape) for path, shape in leaves if path in TERNARIZABLE and find_quantizer(path, rules)]
        packed = 0
        for path, shape in chosen:
            scales = math.prod(scale_shape(matrix_shape(shape), quantizer, input_axis(path)))
            packed += -(-math.prod(shape) // per_byte) + 2 * scales
        total = sum(math.prod(shape) for _, shape in leaves)
        quantized = sum(math.prod(shape) for _, shape in chosen)
        sizes = {f"float{bits}_bytes": packed + bits // 8 * (total - quantized) for bits in (32, 16)}
        rows.append({"weights": name, "parameters": total, "quantized": quantized, **sizes})
    return rows
