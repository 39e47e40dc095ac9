"""A sweep: plans of one recipe for every combination of some keys, as a table and an HTML page."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import ml_collections
import tqdm
from etils import epath

from tclip_jax.pages import aligned, page, paragraph, plot, table
from tclip_jax.planning.hardware import Topology
from tclip_jax.planning.plan import Plan, make_plan
from tclip_jax.planning.roofline import assumptions
from tclip_jax.storage import atomic_folder

_GIB = 2**30
_SHORT = {"batch_size": "data.batch_size"}


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination of values.

    Attributes:
      changes: key of the configuration -> value, as text.
      plan: its plan; None after an error.
      error: message of the error; "" without one.
    """

    changes: dict[str, str]
    plan: Plan | None
    error: str = ""

    @property
    def name(self) -> str:
        return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.changes.items())

    @property
    def rate(self) -> float:
        """Images/s of all devices if nothing overlaps; sweeps compare this rate, because it favours no kind of work."""
        return self.plan.run.data.batch_size / self.plan.estimate.serial if self.plan else 0.0

    def to_json(self) -> dict[str, Any]:
        return {"changes": self.changes, "error": self.error, "plan": self.plan and self.plan.to_json()}


def parse_grid(texts: Sequence[str]) -> list[dict[str, str]]:
    """Return all combinations of values of a sweep.

    Args:
      texts: axes of the sweep, such as "batch_size=1024,2048".

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
        axes.append([(_SHORT.get(key, key), value) for value in values.split(",")])
    return [dict(combination) for combination in itertools.product(*axes)]


def run_sweep(
    configs: Sequence[tuple[dict[str, str], ml_collections.ConfigDict]], topology: Topology, **options: Any
) -> list[Point]:
    """Plan each configuration; an invalid one becomes a point with an error.

    Args:
      configs: (changes, changed configuration) pairs.
      topology: where the runs are planned.
      options: options of `make_plan`.

    Raises:
      ValueError: no configuration can be planned.
    """
    points = []
    for changes, config in tqdm.tqdm(configs, "sweep", unit="plan", disable=None):
        try:
            points.append(Point(changes, make_plan(config, topology, **options)))
        except ValueError as error:
            points.append(Point(changes, None, str(error)))
    if all(point.plan is None for point in points):
        raise ValueError(f"no point of the sweep can be planned; {points[0].name}: {points[0].error}")
    return points


def best(points: Sequence[Point]) -> Point | None:
    """Return the point with the highest `rate` among those that fit, or None if no point fits."""
    fitting = [point for point in points if point.plan and point.plan.fits]
    return max(fitting, key=lambda point: point.rate, default=None)


def sweep_rows(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """Return the rows of the table: a header, and one row for each point."""
    keys = list(points[0].changes)
    header = (
        "",
        *(key.rpartition(".")[2] for key in keys),
        "GiB",
        "fits",
        "compute",
        "memory",
        "network",
        "s",
        "images/s",
    )
    return [header, *((str(i), *_row(point, keys)) for i, point in enumerate(points, 1))]


def sweep_text(points: Sequence[Point]) -> str:
    """Format a sweep for a terminal: the table, the errors, and the best point."""
    lines = aligned(sweep_rows(points))
    lines += [f"{point.name}: {point.error}" for point in points if point.error]
    return "\n".join([*lines, "", _verdict(points)])


def write_sweep(folder: epath.PathLike, points: Sequence[Point]) -> None:
    """Write sweep.json and sweep.html, replacing those of an earlier sweep."""
    parts = [paragraph(_verdict(points), "verdict"), plot(_figure(points), "memory and speed of each point")]
    parts.append(table(sweep_rows(points), marked=[False, *(not (p.plan and p.plan.fits) for p in points)]))
    parts += [paragraph(f"{point.name}: {point.error}", "note") for point in points if point.error]
    first = next(point.plan for point in points if point.plan)
    parts += [paragraph(f"Assumption: {line}", "note") for line in assumptions(first.topology, first.facts)]
    with atomic_folder(folder, overwrite=True) as building:
        (building / "sweep.json").write_text(json.dumps([point.to_json() for point in points], indent=2) + "\n")
        (building / "sweep.html").write_text(page(f"Plans for {first.topology.name}", "\n".join(parts)))


def _figure(points: Sequence[Point]) -> Any:
    """Plot images/s against memory; points have their numbers in the table, and a line shows a device's memory."""
    from matplotlib.figure import Figure

    plans = [(i, point, point.plan) for i, point in enumerate(points, 1) if point.plan]
    figure = Figure(figsize=(9, 5), layout="constrained", dpi=110)
    axes = figure.subplots()
    for i, point, plan in plans:
        size = plan.facts.memory.total / _GIB
        axes.plot(size, point.rate, "o", color="#3b6fb6" if plan.fits else "#c0392b")
        axes.annotate(str(i), (size, point.rate), xytext=(5, 4), textcoords="offset points", fontsize=8)
    limit = plans[0][2].device_memory / _GIB
    if max(plan.facts.memory.total for _, _, plan in plans) > limit * _GIB / 2:
        axes.axvline(limit, color="#c0392b", linestyle="--", label=f"memory of a device: {limit:.1f} GiB")
        axes.legend()
    axes.margins(0.1)
    axes.set(xlabel="GiB per device", ylabel="images/s if nothing overlaps", ylim=(0, None), xlim=(0, None))
    axes.grid(alpha=0.3)
    return figure


def _row(point: Point, keys: Sequence[str]) -> tuple[str, ...]:
    values = tuple(point.changes[key] for key in keys)
    plan = point.plan
    if plan is None:
        return (*values, *("-",) * 7)
    time = plan.estimate
    seconds = (f"{value:.3f}" for value in (time.compute, time.memory, time.network, time.serial))
    fits = "yes" if plan.fits else "NO"
    return (*values, f"{plan.facts.memory.total / _GIB:.2f}", fits, *seconds, f"{point.rate:,.0f}")


def _verdict(points: Sequence[Point]) -> str:
    point = best(points)
    if point is None or point.plan is None:
        return "no point fits into memory"
    return f"best that fits: {point.name}, {point.rate:,.0f} images/s if nothing overlaps"
