"""The record of a run: config.json is its current configuration, history.jsonl has what made every step.

    history.jsonl   a line for the first start, and for each later start that changed something:
                    {"step": done before the start, "changed": {key: [old, new]}, "config": resolved, "data",
                    "teacher", "init", "software", "plugins", "devices"}

A refused start writes nothing. When a restart repeats steps, their lines are dropped.
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

from tclip_jax import keys
from tclip_jax.storage import write_atomic

CONFIG, HISTORY = "config.json", "history.jsonl"

Record = dict[str, Any]
Changes = dict[str, list[Any]]


def read_history(workdir: epath.PathLike) -> list[Record]:
    """Return the lines of history.jsonl, the oldest first; for an older run without it, one line of config.json.

    Raises:
      ValueError: the file is not JSON.
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
    """Return the lines of metrics.jsonl, without a last line that a crash has truncated."""
    path = epath.Path(workdir) / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in whole]


def record_at(history: Iterable[Record], step: int) -> Record:
    """Return the record of the start that made `step`; {} if the history is empty."""
    return next((line for line in reversed(list(history)) if line["step"] < step or not line["step"]), {})


def last_record(workdir: epath.PathLike) -> Record:
    """Return the record of the latest start; {} without a history."""
    return (read_history(workdir) or [{}])[-1]


def changes(old: Any, new: Any, path: str = "") -> Changes:
    """Return the values that differ, as {key: [old, new]}. 1 equals 1.0; keys that `old` lacks are ignored."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        changed: Changes = {}
        for name in new:
            if name in old:
                changed |= changes(old[name], new[name], f"{path}.{name}" if path else name)
        return changed
    return {} if old == new and isinstance(old, bool) == isinstance(new, bool) else {path: [old, new]}


def in_words(changed: Changes, prefixes: Collection[str] = ("",)) -> str:
    """Return "loss.crd 1 → 3, steps 80 → 90" for the keys that start with one of `prefixes`."""
    return ", ".join(
        f"{key} {_short(old)} → {_short(new)}"
        for key, (old, new) in changed.items()
        if any(key.startswith(prefix) for prefix in prefixes)
    )


def write_record(workdir: epath.PathLike, record: Record, step: int, changed: Changes) -> None:
    """Write config.json, and append to history.jsonl if the start at `step` is the first or changed something."""
    workdir = epath.Path(workdir)
    lines = [line for line in read_history(workdir) if line["step"] < step] if step else []
    if changed or not lines or not (workdir / HISTORY).exists():
        lines.append({"step": step, "changed": changed, **record})
    write_atomic(workdir / HISTORY, "".join(json.dumps(line) + "\n" for line in lines))
    write_atomic(workdir / CONFIG, json.dumps(record["config"], indent=2) + "\n")


@functools.cache
def software() -> dict[str, str]:
    """Return the versions of this package and of jax, and the git commits that are known.

    "commit" is that of this package, "working_tree" that of another checkout in whose folders the process was started,
    such as the one of the recipe.
    """
    distribution = importlib.metadata.distribution("tclip-jax")
    versions = {"tclip_jax": distribution.version, "jax": importlib.metadata.version("jax")}
    installed = json.loads(distribution.read_text("direct_url.json") or "{}").get("vcs_info", {}).get("commit_id")
    package, here = pathlib.Path(__file__).resolve().parents[2], pathlib.Path.cwd()
    checkout = next((folder for folder in (here, *here.parents) if (folder / ".git").exists()), package)
    commits = {
        "commit": _git_commit(package) or installed,
        "working_tree": _git_commit(checkout) if checkout != package else None,
    }
    return versions | {name: commit for name, commit in commits.items() if commit}


def _git_commit(folder: pathlib.Path) -> str | None:
    """Return the commit of a git checkout, with "-dirty" if files are modified; None if `folder` is not its root."""
    # A folder of installed packages may be inside the checkout of another project.
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
    """Return the provenance of the weights of a step, from history.jsonl and metrics.jsonl.

    Returns:
      A mapping with "step"; "average", if the weights are the moving average; "config", the digest of the resolved
      configuration; "data" ("source", "split", "samples", "content"); "teacher" and "init", if there are any ("source",
      "content", and for a run "step"); "software"; "plugins", if there are any ("file", "sha256"); "changed", the
      changed keys by the step after which they changed; "metrics", the losses of the step. Values that an older version
      did not record are absent.
    """
    history = [line for line in read_history(workdir) if line["step"] < step or not line["step"]]
    record = record_at(history, step)
    config = record.get("config", {})
    named: dict[str, Any] = {"config": keys.digest(config)} if config else {}
    if "data" in config:
        named["data"] = {key: config["data"][key] for key in ("source", "split")}
    if config.get("teacher"):
        named["teacher"] = {"source": config["teacher"]}
    known = {name: record[name] for name in ("data", "teacher", "init", "software", "plugins") if record.get(name)}
    changed = {str(line["step"]): line["changed"] for line in history if line["changed"]}
    losses = [line for line in _metrics(workdir, step) if "loss" in line]
    metrics = {name: value for line in losses for name, value in line.items() if name.startswith("loss")}
    parts = {"average": average, **named, **known, "changed": changed, "metrics": metrics}
    return {"step": step, **{name: part for name, part in parts.items() if part}}


def run_figures(workdir: epath.PathLike, step: int, *, average: bool = False) -> dict[str, float]:
    """Return the evaluation metrics of a step's weights, or of their moving average."""
    lines = [line for line in _metrics(workdir, step) if "loss" not in line]
    values = {name: value for line in lines for name, value in line.items() if name != "step" and value is not None}
    suffix = "_of_average"
    if average:
        return {name.removesuffix(suffix): value for name, value in values.items() if name.endswith(suffix)}
    return {name: value for name, value in values.items() if not name.endswith(suffix)}


def _metrics(workdir: epath.PathLike, step: int) -> list[dict[str, Any]]:
    return [line for line in read_metrics(workdir) if line["step"] == step and "trits" not in line]
