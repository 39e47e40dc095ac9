"""What a run was made of, start by start: config.json says it of now, history.jsonl of every step before.

    history.jsonl   a line for the first start, and for each later one at which something had changed:
                    {"step": done before it, "changed": {key: [old, new]}, "config": resolved, "data", "teacher",
                    "init", "software"}

Nothing is written of a start that is refused, and lines of steps that a restart does again are dropped.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import pathlib
import subprocess
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from etils import epath

from tclip_jax.storage import write_atomic

CONFIG, HISTORY = "config.json", "history.jsonl"

Record = dict[str, Any]
Changes = dict[str, list[Any]]


def read_history(workdir: epath.PathLike) -> list[Record]:
    """The lines of history.jsonl, the oldest first; of an older run without it what config.json says.

    Raises:
      ValueError: a file that is not JSON.
    """
    workdir = epath.Path(workdir)
    for name in (HISTORY, CONFIG):
        if not (path := workdir / name).exists():
            continue
        try:
            if name == HISTORY:
                return [json.loads(line) for line in path.read_text().splitlines()]
            return [{"step": 0, "changed": {}, "config": json.loads(path.read_text())}]
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
    return []


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a crash cut short is left out."""
    path = epath.Path(workdir) / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in whole]


def record_at(history: Iterable[Record], step: int) -> Record:
    """What the steps up to `step` ended with."""
    return next((line for line in reversed(list(history)) if line["step"] < step or not line["step"]), {})


def changes(kept: Any, wanted: Any, path: str = "") -> Changes:
    """What differs, key by key, as [old, new]; 1 and 1.0 are the same, and what `kept` does not know is none."""
    if isinstance(kept, Mapping) and isinstance(wanted, Mapping):
        found: Changes = {}
        for name in wanted:
            if name in kept:
                found |= changes(kept[name], wanted[name], f"{path}.{name}" if path else name)
        return found
    return {} if kept == wanted and isinstance(kept, bool) == isinstance(wanted, bool) else {path: [kept, wanted]}


def in_words(changed: Changes, under: Collection[str] = ("",)) -> str:
    """ "loss.crd 1 → 3, steps 80 → 90"; of keys that begin so."""
    return ", ".join(
        f"{key} {_short(old)} → {_short(new)}"
        for key, (old, new) in changed.items()
        if any(key.startswith(each) for each in under)
    )


def write_record(workdir: epath.PathLike, record: Record, step: int, changed: Changes) -> None:
    """Writes config.json, and a line of history.jsonl if there is something new to say from `step` on."""
    workdir = epath.Path(workdir)
    lines = [line for line in read_history(workdir) if line["step"] < step] if step else []
    if changed or not lines or not (workdir / HISTORY).exists():
        lines.append({"step": step, "changed": changed, **record})
    write_atomic(workdir / HISTORY, "".join(json.dumps(line) + "\n" for line in lines))
    write_atomic(workdir / CONFIG, json.dumps(record["config"], indent=2) + "\n")


@functools.cache
def software() -> dict[str, str]:
    """The version of this package, and the commit where it runs from a checkout or was installed from one."""
    distribution = importlib.metadata.distribution("tclip-jax")
    found = {"tclip_jax": distribution.version, "jax": importlib.metadata.version("jax")}
    installed = json.loads(distribution.read_text("direct_url.json") or "{}").get("vcs_info", {}).get("commit_id")
    commit = _checked_out(pathlib.Path(__file__).resolve().parents[2]) or installed
    return found | ({"commit": commit} if commit else {})


def _checked_out(folder: pathlib.Path) -> str | None:
    """The commit of a checkout, with "-dirty" where its files are others; None of what is no checkout of this."""
    # A folder of installed packages may lie within somebody else's checkout.
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value or '""'
    return text if len(text) <= 60 else f"{text[:50]}…"


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
    return [line for line in read_metrics(workdir) if line["step"] == step and "trits" not in line]
