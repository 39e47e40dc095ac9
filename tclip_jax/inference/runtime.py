"""What computes a packed model on this machine, and why: the kernel of each ternary weight and the attention of each
tower, without running any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from tclip_jax.artifacts.pack import flatten
from tclip_jax.models.attention import explain_choice as explain_attention
from tclip_jax.models.config import CLIPConfig
from tclip_jax.pages import aligned
from tclip_jax.ternary import QuantizedTensor, UniformTensor, default_activations
from tclip_jax.ternary.kernels import native_cpu
from tclip_jax.ternary.matmul import explain_choice
from tclip_jax.ternary.tensor import traced_device


def inspect_runtime(config: CLIPConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Describe how this machine would run a model in float32.

    Args:
      config: the model's shape.
      params: a tree with `QuantizedTensor` leaves, as `read_artifact` returns it.

    Returns:
      "device"; "instructions" of the native kernel ("" without it); "activations", the default here; "weights", a
      list of rows with "path", "shape", "group", "implementation" and "reason"; and "attention", one with "tower",
      "tokens", "heads", "head_width", "implementation" and "reason".
    """
    activations, rows = default_activations(), []
    for path, leaf in flatten(params).items():
        if not isinstance(leaf, QuantizedTensor):
            continue
        name, reason = "rows", "an embedding table: rows are unpacked as they are selected"
        if leaf.axis == -2 and isinstance(leaf, UniformTensor):
            name, reason = "dequantize", f"integers of {leaf.bits} bits: floats in each product"
        elif leaf.axis == -2:
            name, reason = explain_choice((leaf.shape[-2], leaf.shape[-1]), leaf.group, activations=activations)
        rows.append({"path": path, "shape": leaf.shape, "group": leaf.group, "implementation": name, "reason": reason})
    kind, platform = traced_device()
    return {
        "device": kind if kind == platform else f"{kind} ({platform})",
        "instructions": native_cpu.best_instructions() if platform == "cpu" else "",
        "activations": activations,
        "weights": rows,
        "attention": [_attention(config, tower, rows) for tower in config.towers],
    }


def _attention(config: CLIPConfig, tower: str, weights: list[dict[str, Any]]) -> dict[str, Any]:
    shape, tokens = config.towers[tower]
    kernels = {row["implementation"] for row in weights if row["path"].startswith(f"{tower}/blocks/")}
    head_width = shape.width // shape.heads
    name, reason = explain_attention((1, tokens, shape.heads, head_width), jnp.float32)
    # The conditions of `models.native_block`.
    if native_cpu.NAME in kernels <= {native_cpu.NAME, "dequantize"} and shape.ls_init_value is None:
        name, reason = native_cpu.NAME, "each block runs in native calls; attention is one of them"
    sizes = {"tower": tower, "tokens": tokens, "heads": shape.heads, "head_width": head_width}
    return sizes | {"implementation": name, "reason": reason}


def runtime_text(runtime: Mapping[str, Any]) -> str:
    """Return `inspect_runtime`'s result as aligned text."""
    lines = [
        ("device", runtime["device"]),
        ("activations", f"{runtime['activations']}, {_WHY[runtime['activations']]}"),
    ]
    if runtime["instructions"]:
        lines.insert(1, ("native kernel", runtime["instructions"]))
    table = [("quantized weight", "shape", "group", "implementation", "reason")]
    table += [
        (row["path"], " x ".join(map(str, row["shape"])), str(row["group"]), row["implementation"], row["reason"])
        for row in runtime["weights"]
    ]
    attention = [("attention", "tokens", "heads", "implementation", "reason")]
    attention += [
        (
            row["tower"],
            str(row["tokens"]),
            f"{row['heads']} x {row['head_width']}",
            row["implementation"],
            row["reason"],
        )
        for row in runtime["attention"]
    ]
    parts = (aligned(rows, right=False) for rows in (lines, attention, table))
    return "\n\n".join("\n".join(part) for part in parts)


_WHY = {
    "A16": "16-bit integers: twice the rate of float32 on this CPU",
    "A32": "as they are: no faster products of 16-bit integers here",
}
