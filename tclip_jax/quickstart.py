"""The quick start: a teacher and a ternary student on real images, evaluated, packed, exported and plotted."""

from __future__ import annotations

import functools
import io
import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tclip_jax.artifacts.format import write_artifact
from tclip_jax.artifacts.inspection import (
    compression_real,
    ternary_share,
    theoretical_compression,
    weight_bytes,
    weight_name,
    zero_share,
)
from tclip_jax.artifacts.pack import flatten, pack_params
from tclip_jax.data.eval_batches import to_pil
from tclip_jax.data.images import preprocess
from tclip_jax.data.prompts import captions, templates_for
from tclip_jax.data.sources import Source, open_source
from tclip_jax.evaluation.encoder import Encoder
from tclip_jax.evaluation.zero_shot import Outcome, classify
from tclip_jax.inference.model import Model
from tclip_jax.interop.export import export_model
from tclip_jax.models.trits import HISTOGRAM_EDGES
from tclip_jax.recipes import load_recipe
from tclip_jax.runs.config import run_config
from tclip_jax.runs.record import read_metrics, run_provenance
from tclip_jax.runs.steps import saved_steps
from tclip_jax.storage import write_atomic
from tclip_jax.ternary import TernaryTensor
from tclip_jax.training.loop import train

_logger = logging.getLogger(__name__)

SHOWN = 24  # test images in the report: mistakes first, then correct predictions


def quickstart(workdir: epath.PathLike, recipe: str = "quickstart", mode: str = "") -> dict[str, Any]:
    """Train a teacher and a ternary student, then evaluate, pack and export the student; resume an earlier call.

    Write the runs teacher/ and student/, the folders artifact/ and export/, and the files report.png and summary.json.

    Args:
      workdir: folder of the output.
      recipe: recipe with the arguments "teacher" and "student".
      mode: further argument of the recipe, such as "runlocal".

    Returns:
      The content of summary.json; accuracies, ternary share and zeros are fractions.
    """
    started, workdir = time.perf_counter(), epath.Path(workdir)
    suffix = f",{mode}" if mode else ""
    teacher_config, student_config = load_recipe(f"{recipe}:teacher{suffix}"), load_recipe(f"{recipe}:student{suffix}")
    student_config.teacher = str(workdir / "teacher")
    steps = teacher_config.steps + student_config.steps
    steps_before = sum(max(saved_steps(workdir / name / "checkpoints"), default=0) for name in ("teacher", "student"))
    _logger.info("training the teacher: full precision")
    models = {"teacher": train(teacher_config, workdir / "teacher")}
    _logger.info("training the student: ternary")
    models["student"] = train(student_config, workdir / "student")

    _logger.info("packing, evaluating, exporting")
    run = run_config(student_config)
    source = open_source(run.eval.source, run.eval.split)
    student = models["student"]
    params = pack_params(student.params, student.rules)
    artifact = workdir / "artifact"
    provenance = {"recipe": recipe, **run_provenance(workdir / "student", student_config.steps)}
    write = functools.partial(
        write_artifact,
        artifact,
        config=student.config,
        preprocess=student.preprocess,
        params=params,
        rules=student.rules,
        provenance=provenance,
        overwrite=True,
    )
    # Evaluate the weights that the artifact holds; then write the artifact again with the figures.
    write()
    templates = templates_for(source, run.eval.templates)
    teacher_outcome = classify(Encoder(models["teacher"]), source, templates)
    outcome = classify(Encoder(Model.load(artifact, activations="A32")), source, templates)
    summary = {
        "teacher_accuracy": teacher_outcome.metrics["acc1"],
        "student_accuracy": outcome.metrics["acc1"],
        "ternary_share": ternary_share(params),
        "zeros": zero_share(params),
        "compression_theoretical": theoretical_compression(ternary_share(params)),
        "compression_real": compression_real(params, artifact),
        "artifact_bytes": weight_bytes(artifact),
    }
    figures = {name: value for name, value in summary.items() if name != "teacher_accuracy"}
    write(figures=figures)
    export_model(
        workdir / "export",
        config=student.config,
        preprocess=student.preprocess,
        params=params,
        figures=figures,
        provenance=provenance,
        check=True,
        overwrite=True,
    )
    _write_report(workdir, params, source, outcome, student, templates)
    # The seconds are those of this call, without the training of earlier calls.
    summary |= {"seconds": time.perf_counter() - started, "steps": steps, "steps_before": steps_before}
    write_atomic(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def summary_table(summary: dict[str, Any]) -> str:
    """Format the summary as a table for a terminal, with fractions in per cent."""
    before, steps = summary.get("steps_before", 0), summary.get("steps", 0)
    resumed = f"; {before:,} of {steps:,} training steps by an earlier call" if before else ""
    rows = (
        ("teacher accuracy", f"{summary['teacher_accuracy']:.2%}", "full precision, zero-shot on held-out images"),
        ("student accuracy", f"{summary['student_accuracy']:.2%}", "ternary, evaluated from the packed artifact"),
        ("ternary share", f"{summary['ternary_share']:.2%}", "of all parameters"),
        ("zeros", f"{summary['zeros']:.1%}", "of all trits"),
        ("compression", f"{summary['compression_real']:.2f}x", "float32 bytes / bytes of the weight files"),
        (
            "  by the paper's formula",
            f"{summary['compression_theoretical']:.2f}x",
            "1.58 bits a trit, the rest float32; the files store both in fewer bits",
        ),
        ("artifact", f"{summary['artifact_bytes']:,} B", "its weight files"),
        ("time", f"{summary['seconds']:.0f} s", f"training, evaluation, packing, export{resumed}"),
    )
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name.ljust(widths[0])}  {value.rjust(widths[1])}  {note}" for name, value, note in rows)


def _write_report(
    workdir: epath.Path, params: Any, source: Source, outcome: Outcome, student: Model, templates: Any
) -> None:
    predictions = outcome.predictions["top"][:, 0]
    correct = predictions == outcome.predictions["labels"]
    # Mistakes first; a stable sort keeps the order of the source. Every test image was decoded in the evaluation.
    shown = np.argsort(correct, kind="stable")[:SHOWN]
    predicted = [captions(source.classnames[predictions[i]], templates)[0] for i in shown]
    write_picture(
        workdir / "report.png",
        curves={name: read_metrics(workdir / name) for name in ("teacher", "student")},
        params=params,
        images=[preprocess(to_pil(source[int(i)].image), student.preprocess) for i in shown],
        predicted=predicted,
        correct=correct[shown],
    )


Curves = Mapping[str, Sequence[Mapping[str, Any]]]  # run -> lines of its metrics.jsonl
_COLORS = {-1: "#3b6fb6", 0: "#d9d9d9", 1: "#d1603d"}


def write_picture(
    path: epath.PathLike,
    *,
    curves: Curves,
    params: Mapping[str, Any],
    images: Sequence[npt.NDArray[np.uint8]],
    predicted: Sequence[str],
    correct: Sequence[bool],
) -> None:
    """Write the report of the quick start as a PNG: metrics, trits, and predictions for test images.

    Args:
      path: file to write.
      curves: run -> lines of its metrics.jsonl.
      params: packed parameter tree.
      images: test images, (H, W, 3) uint8 each.
      predicted: predicted caption of each image.
      correct: whether each prediction is correct.
    """
    # Trit snapshots of the last run that has some; runs may differ in their ternary weights.
    snapshots = max(
        ([line for line in lines if "trits" in line] for lines in reversed([*curves.values()])), key=bool, default=[]
    )
    figure = Figure(figsize=(15, 13 if snapshots else 9), layout="constrained", dpi=110)
    heights = (1, 0.8, 1.1) if snapshots else (1, 1.1)
    top, *middle, bottom = np.asarray(figure.subfigures(len(heights), 1, height_ratios=heights))
    loss, accuracy, trits = top.subplots(1, 3, width_ratios=(1, 1, 1.5))
    plot_curves(loss, curves, "loss/task", "contrastive loss")
    plot_curves(accuracy, curves, "zero_shot_accuracy", "zero-shot accuracy")
    plot_trits(trits, params)
    if snapshots:
        plot_dynamics(middle[0].subplots(1, 5), snapshots)
    plot_predictions(bottom, images, predicted, correct)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(path, buffer.getvalue())


def plot_curves(axes: Axes, curves: Curves, metric: str, title: str) -> None:
    """Plot a metric over the steps, one line per run; accuracies in per cent."""
    is_accuracy = metric.endswith("accuracy")
    for name, lines in curves.items():
        points = [(line["step"], line[metric] * (100 if is_accuracy else 1)) for line in lines if metric in line]
        if points:
            last = f" {points[-1][1]:.1f} %" if is_accuracy else ""
            axes.plot(
                *zip(*points, strict=True), label=f"{name}{last}", marker="o" if is_accuracy else None, markersize=3
            )
    axes.set(title=title, xlabel="step", ylabel="%" if is_accuracy else None)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)


def plot_dynamics(axes: npt.NDArray[Any], snapshots: Sequence[Mapping[str, Any]]) -> None:
    """Plot the trit snapshots of a run, one line per weight: zeros, flips, drift, saturation, and the final |w|.

    Args:
      axes: (5,) array of Axes.
      snapshots: lines of metrics.jsonl with "trits"; the plots show means over layers.
    """
    titles = {
        "zeros": "zeros, %",
        "flips": "trits that flip in one step, %",
        "drift": "change of scales in one step, %",
        "saturated": "latent weights beyond s, %",
    }
    for plot, (name, title) in zip(axes, titles.items(), strict=False):
        for path in snapshots[-1]["trits"]:
            points = [(snapshot["step"], 100 * np.mean(snapshot["trits"][path][name])) for snapshot in snapshots]
            plot.plot(*zip(*points, strict=True), label=weight_name(path), marker="o", markersize=3)
        plot.set(title=title, xlabel="step")
        plot.grid(alpha=0.3)
    for path, snapshot in snapshots[-1]["trits"].items():
        axes[-1].stairs(np.mean(snapshot["histogram"], axis=0)[:-1], HISTOGRAM_EDGES, label=weight_name(path))
    axes[-1].set(title="|w| / s at the end, shares", xlabel="|w| / s")
    axes[-1].axvline(0.5, color="grey", linewidth=0.8)  # the threshold of most quantizers
    axes[-1].legend(frameon=False, fontsize=6)


def plot_trits(axes: Axes, params: Mapping[str, Any]) -> None:
    """Plot the fractions of −1, 0 and +1 in each ternary weight of each layer, as stacked bars."""
    shares = {}
    for path, leaf in flatten(params).items():
        if isinstance(leaf, TernaryTensor):
            tower, _, weight = weight_name(path).partition(" ")
            trits, stacked = np.asarray(leaf.trits), len(leaf.shape) == 3
            for layer, values in enumerate(trits if stacked else [trits]):
                label = f"{tower} {layer} {weight}" if stacked else f"{tower} {weight}"
                shares[label] = {trit: 100 * float(np.mean(values == trit)) for trit in (-1, 0, 1)}
    left = np.zeros(len(shares))
    for trit, color in _COLORS.items():
        widths = np.array([share[trit] for share in shares.values()])
        axes.barh(list(shares), widths, left=left, color=color, label=f"{trit:+d}" if trit else "0")
        left += widths
    axes.set(title="trits per layer, %", xlim=(0, 100))
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=max(4, min(8, 260 // max(len(shares), 1))))
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.06), frameon=False)


def plot_predictions(
    figure: Any,
    images: Sequence[npt.NDArray[np.uint8]],
    predicted: Sequence[str],
    correct: Sequence[bool],
    columns: int = 8,
) -> None:
    """Plot images in a grid, each under its predicted caption: green if correct, red if not."""
    rows = max(-(-len(images) // columns), 1)
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle("what the ternary student predicts for test images")
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, caption, is_correct in zip(grid.flat, images, predicted, correct, strict=False):
        axes.imshow(image)
        axes.set_title(caption, fontsize=8, color="#2a7d3f" if is_correct else "#c0392b", parse_math=False)
