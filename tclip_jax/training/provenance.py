"""What an artifact or an export says of the run that its weights come from."""

from __future__ import annotations

from typing import Any

from etils import epath

from tclip_jax.runs.record import read_history, record_at


def run_provenance(workdir: epath.PathLike, step: int, *, average: bool = False) -> dict[str, Any]:
    """Where the weights of a step come from, from history.jsonl and metrics.jsonl of the run.

    Returns:
      "step", and "average" where it is that of the weights; "data" ("source", "split", "samples", "content"); "teacher"
      and "init" ("source", "content", of a run its "step"), where there are any; "software" that trained it; "changed",
      the keys that were changed on the way, by the step after which they were; "metrics", the losses of the step. What
      an older version did not keep is absent.
    """
    history = [line for line in read_history(workdir) if line["step"] < step or not line["step"]]
    record = record_at(history, step)
    config = record.get("config", {})
    named = {"data": {key: config["data"][key] for key in ("source", "split")}} if "data" in config else {}
    if config.get("teacher"):
        named["teacher"] = {"source": config["teacher"]}
    known = {name: record[name] for name in ("data", "teacher", "init", "software") if record.get(name)}
    changed = {str(line["step"]): line["changed"] for line in history if line["changed"]}
    losses = [line for line in _metrics(workdir, step) if "loss" in line]
    metrics = {name: value for line in losses for name, value in line.items() if name.startswith("loss")}
    parts = {"average": average, **named, **known, "changed": changed, "metrics": metrics}
    return {"step": step, **{name: part for name, part in parts.items() if part}}


def run_figures(workdir: epath.PathLike, step: int, *, average: bool = False) -> dict[str, float]:
    """What evaluations measured of exactly these weights: of the step, or of the average at it."""
    lines = [line for line in _metrics(workdir, step) if "loss" not in line]
    values = {name: value for line in lines for name, value in line.items() if name != "step" and value is not None}
    suffix = "_of_average"
    if average:
        return {name.removesuffix(suffix): value for name, value in values.items() if name.endswith(suffix)}
    return {name: value for name, value in values.items() if not name.endswith(suffix)}


def _metrics(workdir: epath.PathLike, step: int) -> list[dict[str, Any]]:
    from tclip_jax.training.telemetry import read_metrics  # with TensorBoard's writer, which imports PyTorch

    return [line for line in read_metrics(workdir) if line["step"] == step and "trits" not in line]
