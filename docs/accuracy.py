"""Writes the tables of docs/accuracy.md and its frontier's picture from kept results: `python docs/accuracy.py`."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np

from benchmarks.accuracy_frontier import equal_bytes_table, frontier_picture, points_of, points_table
from benchmarks.accuracy_results import shown
from configs.accuracy import full_precision_of, plain_of, steps_of
from tclip_jax import keys

PAGE = pathlib.Path(__file__).with_suffix(".md")
PICTURE = PAGE.with_name("figures") / "frontier.svg"
RESULTS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "accuracy.json"
Entry = dict[str, Any]
Results = dict[int, dict[str, Any]]  # by seed
FRONTIER = {"data": "cifar10_words", "split": "test", "steps": 1000, "distilled": True, "siglip": False}
EMOJI = {"data": "emoji", "split": "test", "width": 64, "siglip": False}
FIRST_SEEDS = range(20, 25)  # of the first runs, at one rate for all widths
# Between <!-- results: NAME --> and <!-- end -->; NAME -> what an entry must have.
TABLES: dict[str, dict[str, Any]] = {
    "choose": {"data": "cifar10", "split": "choose", "width": 64, "siglip": False},
    "final": {"data": "cifar10", "split": "test", "width": 64, "siglip": False},
    "wide": {"data": "cifar10_words", "split": "test", "width": 256, "siglip": False},
    "wide_choose": {"data": "cifar10_words", "split": "choose", "width": 256, "siglip": False},
    "emoji": EMOJI,
    "emoji_unseen": EMOJI,
    "differences": {"data": "cifar10", "split": "test", "width": 64, "siglip": False, "distilled": True, "steps": 1000},
    "frontier": FRONTIER,
    "equal_bytes": FRONTIER,
}
# Of the final table: (variant, what it is compared with).
DIFFERENCES = (
    ("ternaryclip+clipped+dead_zone+x4", "full+x4"),
    ("ternaryclip+clipped+muon+x16", "full+muon+x16"),
    ("ternaryclip+clipped+muon+longer+x16", "full+muon+x16"),
    ("ternaryclip+clipped+muon+x16", "ternaryclip+muon+x16"),
)
_MARKED = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def page(text: str, entries: list[Entry]) -> str:
    """Return the page with each marked table made anew.

    Raises:
      ValueError: a marker names no table.
    """

    def table_of(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"{PAGE.name}: no table {match[2]!r}: there are {', '.join(TABLES)}")
        made = MAKERS.get(match[2], table)(chosen(entries, TABLES[match[2]]))
        return f"{match[1]}\n{made}\n{match[3]}"

    return _MARKED.sub(table_of, text)


def chosen(entries: Iterable[Entry], wanted: dict[str, Any]) -> list[Entry]:
    """Return the entries that have all wanted values; of the frontier without its first runs, and of equal steps."""
    matching = [entry for entry in entries if wanted.items() <= entry.items()]
    if wanted is not FRONTIER:
        return matching
    equal = (entry for entry in matching if steps_of(entry["variant"], entry["steps"]) == entry["steps"])
    return [entry for entry in equal if entry["seed"] not in FIRST_SEEDS]


def table(entries: Iterable[Entry], metric: str = "accuracy") -> str:
    """Return a Markdown table: a row for each variant, its steps, mean of a metric over seeds, and what it costs.

    Differences are in points and paired by seed: "to plain" to `plain_of` the variant, "to full" to its
    `full_precision_of`, where there are such results. CPU time is that of training, relative to the plain variant.
    """
    groups: dict[tuple[Any, ...], Results] = {}
    for entry in entries:
        key = (entry["steps"], entry["distilled"], entry["variant"])
        groups.setdefault(key, {})[entry["seed"]] = entry["result"]
    lines = [
        f"| variant | steps | seeds | {metric} | to plain | to full | towers, kB | CPU time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (steps, distilled, variant), results in sorted(groups.items()):
        name = variant if distilled else f"{variant}, no teacher"
        cells = [name, f"{steps_of(variant, steps):,}", str(len(results))]
        if failed := [result["failed"] for result in results.values() if "failed" in result]:
            cells += [f"failed: {failed[0]}", "", "", "", ""]
        else:
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


def differences(entries: Iterable[Entry]) -> str:
    """Return a Markdown table of the pairs of `DIFFERENCES` that have been run."""
    by_variant: dict[str, Results] = {}
    for entry in entries:
        by_variant.setdefault(entry["variant"], {})[entry["seed"]] = entry["result"]
    lines = ["| variant | compared with | seeds | difference |", "|---|---|---|---|"]
    for ours, theirs in DIFFERENCES:
        paired = pairs(by_variant.get(ours, {}), by_variant.get(theirs, {}))
        if points := [one["accuracy"] - other["accuracy"] for one, other in paired]:
            lines.append(f"| {ours} | {theirs} | {len(points)} | {shown(points, sign=True)} |")
    return "\n".join(lines) + "\n"


def made_by_results(entries: list[Entry]) -> str:
    """Return what a picture of these results says of its making, in its metadata."""
    return f"python docs/accuracy.py, results {keys.digest({'entries': entries})}"


MAKERS = {
    "emoji": lambda entries: table(entries, "R@5"),
    "emoji_unseen": lambda entries: table(entries, "R@5 unseen names"),
    "differences": differences,
    "frontier": lambda entries: points_table(points_of(entries)),
    "equal_bytes": lambda entries: equal_bytes_table(points_of(entries)),
}

if __name__ == "__main__":
    entries = json.loads(RESULTS.read_text("utf-8"))["results"]
    PAGE.write_text(page(PAGE.read_text("utf-8"), entries), encoding="utf-8")
    matplotlib.rcParams.update({"svg.hashsalt": "tclip", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]})
    if kept := chosen(entries, FRONTIER):
        metadata = {"Date": None, "Description": made_by_results(kept)}
        frontier_picture(points_of(kept)).savefig(PICTURE, metadata=metadata)
