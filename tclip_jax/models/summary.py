"""The table of a model's parameters: shape, dtype, sharding, quantizer, and the ternary share."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from tclip_jax.models.ternary_rules import TERNARIZABLE, TernaryRules, find_quantizer, is_learned_scale
from tclip_jax.parallel.sharding import partition_spec, path_of


def parameter_rows(params: Any, rules: TernaryRules, mesh: Mesh | AbstractMesh) -> list[dict[str, Any]]:
    """Describe each parameter by a dict.

    Args:
      params: a parameter tree of arrays or jax.ShapeDtypeStruct.
      rules: (regex, quantizer) pairs that select the ternary parameters.
      mesh: the mesh of the shardings.

    Returns:
      Dicts with path, shape, size, dtype, sharding, and `ternary`, the quantizer's description or "" for a float
      parameter.
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
                "ternary": quantizer.description if quantizer else "",
            }
        )
    return rows


def parameter_table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as a table for a terminal.

    Totals and ternary shares, with and without the token embedding, follow below the table.
    """
    columns = ("path", "shape", "size", "dtype", "sharding", "ternary")
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
        total, ternary = (sum(row["size"] for row in part if keep(row)) for keep in (bool, lambda row: row["ternary"]))
        lines.append(f"{name}: {total:,}, of which ternary {ternary:,} ({ternary / total:.2%})")
    return "\n".join(line.rstrip() for line in lines)
