"""What computes a packed model on this machine, and why: the kernel of each ternary weight, without running any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tclip_jax.artifacts.pack import flatten
from tclip_jax.pages import aligned
from tclip_jax.ternary import QuantizedTensor, UniformTensor, default_activations
from tclip_jax.ternary.kernels import native_cpu
from tclip_jax.ternary.matmul import explain_choice
from tclip_jax.ternary.tensor import traced_device


def inspect_runtime(params: Mapping[str, Any]) -> dict[str, Any]:
    """Describe how this machine would run a model.

    Args:
      params: a tree with `QuantizedTensor` leaves, as `read_artifact` returns it.

    Returns:
      "device"; "instructions" of the native kernel ("" without it); "activations", the default here; and "weights", a
      list of rows with "path", "shape", "group", "implementation" and "reason".
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
    }


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
    return "\n".join([*aligned(lines, right=False), "", *aligned(table, right=False)])


_WHY = {
    "A16": "16-bit integers: twice the rate of float32 on this CPU",
    "A32": "as they are: no faster products of 16-bit integers here",
}
