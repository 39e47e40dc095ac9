"""A sweep: plans of one recipe for every combination of some keys, as a table and an HTML page."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Sequence
from typing import Any

import ml_collections
import tqdm
from etils import epath

from tclip_jax.pages import aligned, page, paragraph, plot, table
from tclip_jax.planning.child import DoesNotFitError
from tclip_jax.planning.hardware import Topology
from tclip_jax.planning.plan import Plan, between, make_plan
from tclip_jax.planning.roofline import assumptions
from tclip_jax.storage import atomic_folder

_GIB = 2**30
_SHORT = {"batch_size": "data.batch_size"}
# Parts of the memory in the plot -> fields of `Memory`, and a colour.
_PARTS = {
    "parameters and average": (("parameters", "average"), "#2f5d8a"),
    "optimizer": (("optimizer",), "#6fa3d4"),
    "teacher": (("teacher",), "#8a6bb1"),
    "activations, gradients": (("temporaries",), "#e0a030"),
    "batch, program, rest": (("batch", "program", "padding", "outputs"), "#9a9a9a"),
}

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination of values.

    Attributes:
      changes: key of the configuration -> value, as text.
      plan: its plan; None after an error.
      error: message of the error; "" without one.
      fits: whether the error is not that the compiler has no place for the arrays.
    """

    changes: dict[str, str]
    plan: Plan | None
    error: str = ""
    fits: bool = True

    @property
    def name(self) -> str:
        return ", ".join(f"{_short(key)}={value}" for key, value in self.changes.items())

    @property
    def result(self) -> str:
        """What the plan found, in a line."""
        if self.plan is None:
            return self.error
        memory = f"{self.plan.facts.memory.total / _GIB:.2f} GiB, {'fits' if self.plan.fits else 'does NOT fit'}"
        return f"{memory}, {between(self.plan, 'images_per_second')} images/s"

    @property
    def rate(self) -> tuple[float, float]:
        """Images/s of all devices at the slow end, then if nothing overlaps, which decides between equal points."""
        if self.plan is None:
            return 0.0, 0.0
        time = self.plan.estimate
        return time.slow.images_per_second, self.plan.run.data.batch_size / time.serial

    def to_json(self) -> dict[str, Any]:
        return {"changes": self.changes, "error": self.error, "plan": self.plan and self.plan.to_json()}


def parse_grid(texts: Sequence[str]) -> list[dict[str, str]]:
    """Return all combinations of values of a sweep.

    Args:
      texts: axes of the sweep, such as "batch_size=1024,2048"; commas within brackets do not separate values.

    Returns:
      For each combination: key of the configuration -> value, as text.

    Raises:
      ValueError: an axis has no values.
    """
    axes: list[list[tuple[str, str]]] = []
    for text in texts:
        key, _, values = text.partition("=")
        if not values:
            raise ValueError(f"--sweep {text!r} has no values: write KEY=A,B, such as batch_size=16384,32768")
        axes.append([(_SHORT.get(key, key), value) for value in _split(values)])
    return [dict(combination) for combination in itertools.product(*axes)]


def _short(key: str) -> str:
    return key.removeprefix("data.").removeprefix("mesh.")


def _split(text: str) -> list[str]:
    """Split a text at its commas, except within brackets."""
    values, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    return values


def run_sweep(
    configs: Sequence[tuple[dict[str, str], ml_collections.ConfigDict]], topology: Topology, **options: Any
) -> list[Point]:
    """Plan each configuration; an invalid one becomes a point with an error. The log has a line for each.

    Args:
      configs: (changes, changed configuration) pairs.
      topology: where the runs are planned.
      options: options of `make_plan`.

    Raises:
      ValueError: no configuration can be planned.
    """
    points: list[Point] = []
    with tqdm.tqdm(total=len(configs), desc="sweep", unit="plan", disable=None, leave=False) as bar:
        for i, (changes, config) in enumerate(configs, 1):
            bar.set_postfix_str(Point(changes, None).name)
            try:
                points.append(Point(changes, make_plan(config, topology, **options)))
            except ValueError as error:
                points.append(Point(changes, None, str(error), not isinstance(error, DoesNotFitError)))
            _logger.info("%d of %d: %s: %s", i, len(configs), points[-1].name, points[-1].result)
            bar.update()
    if all(point.plan is None for point in points):
        raise ValueError(f"no point of the sweep can be planned; {points[0].name}: {points[0].error}")
    return points


def best(points: Sequence[Point]) -> Point | None:
    """Return the point with the highest `rate` among those that fit, or None if no point fits."""
    fitting = [point for point in points if point.plan and point.plan.fits]
    return max(fitting, key=lambda point: point.rate, default=None)


def sweep_rows(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """Return the rows of the table: a header with units, and one row for each point."""
    keys = list(points[0].changes)
    priced = any(point.plan and point.plan.estimate.slow.cost is not None for point in points)
    header = ("", *map(_short, keys), *_COLUMNS, *(("cost",) if priced else ()))
    return [header, *((str(i), *_row(point, keys, priced)) for i, point in enumerate(points, 1))]


_COLUMNS = ("fits", "GiB", "optimizer GiB", "bound by", "images/s", "MFU %", "hours", "chip-hours")


def _row(point: Point, keys: Sequence[str], priced: bool) -> tuple[str, ...]:
    values, plan = tuple(point.changes[key] for key in keys), point.plan
    if plan is None:
        return (*values, "-" if point.fits else "NO", *("-",) * (len(_COLUMNS) + priced - 1))
    memory = plan.facts.memory
    return (
        *values,
        f"{'yes' if plan.fits else 'NO'}, {memory.total / plan.device_memory:.0%}",
        f"{memory.total / _GIB:.2f}",
        f"{memory.optimizer / _GIB:.3f}",
        plan.estimate.bound_by,
        between(plan, "images_per_second", " – "),
        between(plan, "mfu", " – ", 100),
        between(plan, "hours", " – "),
        between(plan, "chip_hours", " – "),
        *((between(plan, "cost", " – "),) if priced else ()),
    )


def sweep_text(points: Sequence[Point]) -> str:
    """Format a sweep for a terminal: the table, the errors, and the best point."""
    lines = aligned(sweep_rows(points))
    lines += [f"{point.name}: {point.error}" for point in points if point.error]
    return "\n".join([*lines, "", _explanation(points), _verdict(points)])


def write_sweep(folder: epath.PathLike, points: Sequence[Point]) -> None:
    """Write sweep.json and sweep.html, replacing those of an earlier sweep."""
    parts = [paragraph(_verdict(points), "verdict"), plot(_figure(points), "memory and speed of each point")]
    parts.append(table(sweep_rows(points), marked=[False, *(not (p.plan and p.plan.fits) for p in points)]))
    parts.append(paragraph(_explanation(points)))
    parts += [paragraph(f"{point.name}: {point.error}", "note") for point in points if point.error]
    first = next(point.plan for point in points if point.plan)
    parts += [paragraph(f"Assumption: {line}", "note") for line in assumptions(first.topology, first.facts)]
    with atomic_folder(folder, overwrite=True) as building:
        (building / "sweep.json").write_text(json.dumps([point.to_json() for point in points], indent=2) + "\n")
        (building / "sweep.html").write_text(page(f"Plans for {first.topology.name}", "\n".join(parts)))


def _figure(points: Sequence[Point]) -> Any:
    """Draw a row for each point: its memory by content and that of a device, and below its range of images/s."""
    from matplotlib.figure import Figure

    plans = [(i, point, point.plan) for i, point in enumerate(points, 1) if point.plan]
    figure = Figure(figsize=(8, 2.8 + 0.5 * len(plans)), layout="constrained", dpi=110)
    memory, speed = figure.subplots(2, 1)
    rows, limit = range(len(plans)), plans[0][2].device_memory / _GIB
    start = [0.0] * len(plans)
    for label, (fields, color) in _PARTS.items():
        sizes = [sum(getattr(plan.facts.memory, field) for field in fields) / _GIB for _, _, plan in plans]
        memory.barh(rows, sizes, left=start, height=0.7, color=color, label=label)
        start = [left + size for left, size in zip(start, sizes, strict=True)]
    memory.axvline(limit, color="#c0392b", linestyle="--", label=f"memory of a device, {limit:.1f} GiB")
    memory.set(xlabel="memory per device, GiB", xlim=(0, 1.05 * max(limit, *start)))
    for row, (_, _, plan) in enumerate(plans):
        ends = plan.estimate.slow.images_per_second, plan.estimate.fast.images_per_second
        speed.plot(ends, (row, row), "|-", color="#3b6fb6" if plan.fits else "#c0392b", linewidth=4, markersize=11)
    speed.set(xlabel="images/s, slow to fast end (red: does not fit)", xlim=(0, None), ylim=memory.get_ylim())
    for axes in (memory, speed):
        axes.set_yticks(rows, [str(i) for i, _, _ in plans])  # as in the table
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    speed.xaxis.set_major_formatter("{x:,.0f}")
    speed.locator_params(axis="x", nbins=4)
    legend = {"ncols": 2, "fontsize": 7, "handlelength": 1.2, "columnspacing": 1, "frameon": False}
    figure.legend(*memory.get_legend_handles_labels(), loc="outside upper left", **legend)
    return figure


def _explanation(points: Sequence[Point]) -> str:
    time = next(point.plan.estimate for point in points if point.plan)
    return (
        "GiB per device; ranges from the bound (peak rates, everything overlaps) to the slow end (nothing overlaps, or"
        f" matrix products at {time.efficiency:.0%} of the peak rate, an assumption, if that is slower)"
    )


def _verdict(points: Sequence[Point]) -> str:
    point = best(points)
    if point is None or point.plan is None:
        return "no point fits into memory"
    return f"best at the slow end that fits: {point.name}, {between(point.plan, 'images_per_second')} images/s"
