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
