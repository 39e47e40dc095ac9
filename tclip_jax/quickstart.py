"""The whole path on real images: teacher, ternary student, evaluation, artifact, export, picture."""

from __future__ import annotations

import functools
import json
import logging
import time
from typing import Any

import numpy as np
from etils import epath

from tclip_jax.artifacts.format import write_artifact
from tclip_jax.artifacts.inspection import (
    compression_real,
    ternary_share,
    theoretical_compression,
    weight_bytes,
    zero_share,
)
from tclip_jax.artifacts.pack import pack_params
from tclip_jax.data.images import preprocess
from tclip_jax.data.pipeline import to_pil
from tclip_jax.data.prompts import captions, templates_for
from tclip_jax.data.sources import Source, open_source
from tclip_jax.evaluation.encoder import Encoder
from tclip_jax.evaluation.report import write_report
from tclip_jax.evaluation.zero_shot import Outcome, classify
from tclip_jax.inference.model import Model
from tclip_jax.interop.export import export_pytorch
from tclip_jax.recipes import load_recipe
from tclip_jax.runs.config import run_config
from tclip_jax.runs.record import read_metrics, run_provenance
from tclip_jax.runs.steps import saved_steps
from tclip_jax.storage import write_atomic
from tclip_jax.training.loop import train

_logger = logging.getLogger(__name__)

SHOWN = 24  # test images in the picture: all mistakes that fit, then right ones


def quickstart(workdir: epath.PathLike, recipe: str = "quickstart", mode: str = "") -> dict[str, Any]:
    """Trains `recipe`:teacher and `recipe`:student in `workdir`, going on where an earlier call stopped.

    Leaves teacher/, student/ (runs), artifact/, export/, report.png and summary.json.

    Args:
      mode: the recipe's further argument, as "runlocal".

    Returns:
      The content of summary.json; accuracies, shares and zeros are fractions.
    """
    started, workdir = time.perf_counter(), epath.Path(workdir)
    suffix = f",{mode}" if mode else ""
    teacher_config, student_config = load_recipe(f"{recipe}:teacher{suffix}"), load_recipe(f"{recipe}:student{suffix}")
    student_config.teacher = str(workdir / "teacher")
    steps = teacher_config.steps + student_config.steps
    steps_before = sum(max(saved_steps(workdir / name / "checkpoints"), default=0) for name in ("teacher", "student"))
    _logger.info("training the teacher: full precision, %d steps", teacher_config.steps)
    models = {"teacher": train(teacher_config, workdir / "teacher")}
    _logger.info("training the student: ternary, %d steps", student_config.steps)
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
    # What is evaluated is what is kept: the packed weights, from the artifact's own bytes; then with what was found.
    write()
    templates = templates_for(source, run.eval.templates)
    teacher_outcome = classify(Encoder(models["teacher"]), source, templates)
    outcome = classify(Encoder(Model.load(artifact)), source, templates)
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
    export_pytorch(
        workdir / "export",
        config=student.config,
        preprocess=student.preprocess,
        params=params,
        figures=figures,
        provenance=provenance,
        check=True,
        overwrite=True,
    )
    _write_picture(workdir, params, source, outcome, student, templates)
    # Of this call: what an earlier one has done is not in it.
    summary |= {"seconds": time.perf_counter() - started, "steps": steps, "steps_before": steps_before}
    write_atomic(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def summary_table(summary: dict[str, Any]) -> str:
    """The summary aligned for a terminal, shares in per cent."""
    before, steps = summary.get("steps_before", 0), summary.get("steps", 0)
    done = f"; {before:,} of {steps:,} training steps were there before" if before else ""
    rows = (
        ("teacher accuracy", f"{summary['teacher_accuracy']:.2%}", "full precision, zero-shot on held-out images"),
        ("student accuracy", f"{summary['student_accuracy']:.2%}", "ternary, evaluated from the packed artifact"),
        ("ternary share", f"{summary['ternary_share']:.2%}", "of all parameters"),
        ("zeros", f"{summary['zeros']:.1%}", "of all trits"),
        (
            "compression, theoretical",
            f"{summary['compression_theoretical']:.2f}x",
            "1.58 bits a trit, the rest float32",
        ),
        ("compression, real", f"{summary['compression_real']:.2f}x", "float32 bytes / bytes of the weight files"),
        ("artifact", f"{summary['artifact_bytes']:,} B", "its weight files"),
        ("time", f"{summary['seconds']:.0f} s", f"training, evaluation, packing, export{done}"),
    )
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name.ljust(widths[0])}  {value.rjust(widths[1])}  {what}" for name, value, what in rows)


def _write_picture(
    workdir: epath.Path, params: Any, source: Source, outcome: Outcome, student: Model, templates: Any
) -> None:
    predictions = outcome.predictions["top"][:, 0]
    right = predictions == outcome.predictions["labels"]
    # Stable sort: mistakes first, each kind in the order of the source. All images of a picture are readable here.
    shown = np.argsort(right, kind="stable")[:SHOWN]
    said = [captions(source.classnames[predictions[i]], templates)[0] for i in shown]
    write_report(
        workdir / "report.png",
        curves={name: read_metrics(workdir / name) for name in ("teacher", "student")},
        params=params,
        images=[preprocess(to_pil(source[int(i)].image), student.preprocess) for i in shown],
        said=said,
        correct=right[shown],
    )
