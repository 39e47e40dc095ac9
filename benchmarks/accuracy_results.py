"""Results of the accuracy benchmark: those that the repository keeps, their tables, and a plot of differences."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from configs.accuracy import full_precision_of
from tclip_jax import keys
from tclip_jax.artifacts.coding import encode
from tclip_jax.artifacts.pack import flatten, repack_leaf
from tclip_jax.evaluation.probe import t_interval
from tclip_jax.models.ternary_rules import TOKEN_EMBEDDING
from tclip_jax.storage import write_atomic
from tclip_jax.ternary.tensor import QuantizedTensor

FULL = "full"
# Metric -> (split, its name in the evaluation).
METRICS = {
    "cifar10": {"accuracy": ("test", "acc1")},
    "cifar10_words": {"accuracy": ("test", "acc1")},
    "emoji": {"R@5": ("test", "text_retrieval_recall@5"), "R@5 unseen names": ("unseen", "text_retrieval_recall@5")},
}
SHARES = ("share", "share without embedding", "zeros", "zeros without embedding")


class Kept:
    """Results in a JSON file, one entry for each experiment, keyed by the digest of what made it.

    Entries are sorted, so that files of several machines merge. An entry is what a person reads ("data", "split",
    "variant", "distilled", "siglip", "width", "steps", "seed", and the "commit" of the code), "result", and "made_by":
    digests of the configuration of student, teacher and pretraining and of the images, how the teacher is used, and the
    version. A failed experiment has {"failed": its error}.

    Args:
      path: the file; it need not exist.

    Raises:
      ValueError: the file is not such a file.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._entries: dict[str, dict[str, Any]] = {}
        self._read()

    def _read(self) -> None:
        if not self._path.exists():
            return
        try:
            entries = json.loads(self._path.read_text("utf-8"))["results"]
            self._entries |= {keys.digest(entry["made_by"]): entry for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._path}: not a file of results: {type(error).__name__}: {error}") from None

    def find(self, made_by: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the result of the experiment that these inputs make, or None."""
        entry = self._entries.get(keys.digest(made_by))
        return entry["result"] if entry else None

    def add(self, described: Mapping[str, Any], made_by: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Write a result, atomically, with those that another process has written meanwhile."""
        self._read()
        self._entries[keys.digest(made_by)] = {**described, "result": dict(result), "made_by": dict(made_by)}
        of_reading = ("data", "split", "distilled", "siglip", "width", "steps", "variant", "seed")
        entries = sorted(self._entries.values(), key=lambda entry: str([entry.get(name) for name in of_reading]))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(entry, sort_keys=True) for entry in entries)
        write_atomic(epath.Path(self._path), f'{{"results": [\n{lines}\n]}}\n')


def sizes_of(params: Any) -> dict[str, int]:
    """Return the bytes of packed parameters in an artifact, compressed, and in memory, packed for this machine.

    Floats are float16 in both. "… without embedding" leaves out the token embedding.
    """
    leaves = flatten(params)
    stored = {
        path: sum(array.nbytes for array in encode(path, leaf, "float16")[1].values()) for path, leaf in leaves.items()
    }
    resident = {path: _resident_bytes(leaf) for path, leaf in leaves.items()}
    return {
        "bytes": sum(stored.values()),
        "bytes without embedding": sum(stored.values()) - stored[TOKEN_EMBEDDING],
        "resident bytes": sum(resident.values()),
        "resident bytes without embedding": sum(resident.values()) - resident[TOKEN_EMBEDDING],
    }


def _resident_bytes(leaf: Any) -> int:
    if not isinstance(leaf, QuantizedTensor):
        return 2 * math.prod(leaf.shape)
    return sum(array.nbytes for array in jax.tree.leaves(repack_leaf(leaf)))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half-width of the 95 % interval by Student's t; NaN for a single value."""
    low, high = t_interval(values)
    return float(np.mean(values)), (high - low) / 2


def shown(fractions: list[float], *, sign: bool = False) -> str:
    """Return mean ± half a 95 % interval, in per cent or points; "" for no value, and no interval for a single one."""
    if not fractions:
        return ""
    mean, half = interval(fractions)
    text = f"{100 * mean:{'+' if sign else ''}.2f}".replace("-", "−")
    return text if math.isnan(half) else f"{text} ± {100 * half:.2f}"


def table(rows: list[dict[str, Any]], against: str) -> str:
    """Return the rows as an aligned table, fractions in per cent; differences are those to `against`."""
    heads = ("data", "variant", "metric", "seeds", "mean", "± 95 %", f"to {against}", "± 95 %")
    lines = [[*heads, "ternary", "(no emb.)", "zeros", "(no emb.)"]]
    for row in rows:
        numbers = (
            row["mean"], row["half"], row["difference"], row["difference_half"], row["share"],
            row["share without embedding"], row["zeros"], row["zeros without embedding"],
        )  # fmt: skip
        shown = ["" if math.isnan(number) else f"{100 * number:.2f}" for number in numbers]
        lines.append([row["data"], row["variant"], row["metric"], str(row["seeds"]), *shown])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def summarize(data: str, who: str, distilled: bool, results: Any, against: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each metric of a variant. `results` has the results of every variant, one per seed.

    Against full precision, a variant is compared with the one that has the same methods, or with none if that is
    missing.
    """
    other = full_precision_of(who) if against == FULL else against
    variant, others = results[who, distilled], results.get((other, distilled), []) if other != who else []
    for metric in METRICS[data]:
        mean, half = interval([each[metric] for each in variant])
        pairs = [a[metric] - b[metric] for a, b in zip(variant, others, strict=False)]
        difference, difference_half = interval(pairs) if pairs else (math.nan, math.nan)
        shares = {name: float(np.mean([each[name] for each in variant])) for name in SHARES}
        yield {
            "data": data,
            "variant": who if distilled else f"{who}, plain",
            "metric": metric,
            "seeds": len(variant),
            "mean": mean,
            "half": half,
            "difference": difference,
            "difference_half": difference_half,
            **shares,
        }


def picture(rows: list[dict[str, Any]], against: str) -> Figure:
    """Plot the differences from `against` in points, with 95 % intervals; one plot per metric."""
    compared = [row for row in rows if not math.isnan(row["difference"])]
    groups = list(dict.fromkeys((row["data"], row["metric"]) for row in compared))
    most = max(sum((row["data"], row["metric"]) == group for row in compared) for group in groups)
    figure = Figure(figsize=(4.2 * len(groups), 1.2 + 0.28 * most), layout="constrained")
    for axes, (data, metric) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        group = [row for row in compared if (row["data"], row["metric"]) == (data, metric)]
        points, halves = ([100 * row[name] for row in group] for name in ("difference", "difference_half"))
        axes.errorbar(points, [row["variant"] for row in group], xerr=halves, fmt="o", color="#d1603d", capsize=3)
        axes.axvline(0, color="#9aa5b1")
        axes.set_title(f"{data}, {metric}", fontsize=10)
        axes.set_xlabel("points to full precision" if against == FULL else f"points to {against}")
        axes.invert_yaxis()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
    return figure
