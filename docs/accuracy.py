"""Writes the tables of docs/accuracy.md from the kept results: `python docs/accuracy.py`."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from configs.accuracy import full_precision_of, plain_of, steps_of
from tclip_jax.evaluation.probe import t_interval

PAGE = pathlib.Path(__file__).with_suffix(".md")
RESULTS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "accuracy.json"
Entry = dict[str, Any]
Results = dict[int, dict[str, Any]]  # by seed
# Between <!-- results: NAME --> and <!-- end -->; NAME -> what an entry must have.
TABLES: dict[str, dict[str, Any]] = {
    "choose": {"data": "cifar10", "split": "choose", "width": 64, "siglip": False},
    "final": {"data": "cifar10", "split": "test", "width": 64, "siglip": False},
    "wide": {"data": "cifar10", "split": "test", "width": 256, "siglip": False},
    "emoji": {"data": "emoji", "split": "test", "width": 64, "siglip": False},
}
_MARKED = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def page(text: str, entries: list[Entry]) -> str:
    """Return the page with each marked table made anew.

    Raises:
      ValueError: a marker names no table.
    """

    def table_of(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"{PAGE.name}: no table {match[2]!r}: there are {', '.join(TABLES)}")
        wanted = TABLES[match[2]].items()
        return f"{match[1]}\n{table(entry for entry in entries if wanted <= entry.items())}\n{match[3]}"

    return _MARKED.sub(table_of, text)


def table(entries: Iterable[Entry]) -> str:
    """Return a Markdown table: a row for each variant, its steps, mean accuracy over seeds, and what it costs.

    Differences are in points and paired by seed: "to plain" to `plain_of` the variant, "to full" to its
    `full_precision_of`, where there are such results. CPU time is that of training, relative to the plain variant.
    """
    groups: dict[tuple[Any, ...], Results] = {}
    for entry in entries:
        key = (entry["steps"], entry["distilled"], entry["variant"])
        groups.setdefault(key, {})[entry["seed"]] = entry["result"]
    lines = [
        "| variant | steps | seeds | accuracy | to plain | to full | towers, kB | CPU time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (steps, distilled, variant), results in sorted(groups.items()):
        name = variant if distilled else f"{variant}, no teacher"
        cells = [name, f"{steps_of(variant, steps):,}", str(len(results))]
        if failed := [result["failed"] for result in results.values() if "failed" in result]:
            cells += [f"failed: {failed[0]}", "", "", "", ""]
        else:
            metric = "accuracy" if "accuracy" in next(iter(results.values())) else "R@5"
            plain, full = (
                pairs(results, groups.get((steps, distilled, other), {})) if other != variant else []
                for other in (plain_of(variant), full_precision_of(variant))
            )
            times = [(ours.get("cpu_seconds"), theirs.get("cpu_seconds")) for ours, theirs in plain]
            ratios = [ours / theirs for ours, theirs in times if ours and theirs]
            cells += [
                shown([result[metric] for result in results.values()]),
                *(shown([ours[metric] - theirs[metric] for ours, theirs in each], sign=True) for each in (plain, full)),
                f"{np.mean([result['bytes without embedding'] for result in results.values()]) / 1e3:,.0f}",
                f"{np.mean(ratios):.2f}x" if ratios else "",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def pairs(ours: Results, theirs: Results) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the results of two variants by seed, without the seeds that failed or that one of them lacks."""
    return [(result, theirs[seed]) for seed, result in ours.items() if "failed" not in theirs.get(seed, {"failed": ""})]


def shown(fractions: list[float], *, sign: bool = False) -> str:
    """Return mean ± half a 95 % interval, in per cent or points; "" for no value, and no interval for a single one."""
    if not fractions:
        return ""
    mean, (low, high) = 100 * float(np.mean(fractions)), t_interval(fractions)
    text = f"{mean:{'+' if sign else ''}.2f}".replace("-", "−")
    return text if np.isnan(low) else f"{text} ± {50 * (high - low):.2f}"


if __name__ == "__main__":
    entries = json.loads(RESULTS.read_text("utf-8"))["results"]
    PAGE.write_text(page(PAGE.read_text("utf-8"), entries), encoding="utf-8")
