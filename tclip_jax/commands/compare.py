"""Example:
  tclip compare activations runs/student export --html compare.html

A, B and MODEL: the workdir of a run, an artifact, a folder of open_clip or transformers, a file of open_clip (with
--preset or --model-cfg) or a GGUF file. B is the reference. For activations B may be an export for a runtime,
which runs it: export/onnx for onnxruntime, export/litert for ai-edge-litert.
The output has the options that the models state differently, PASS or FAIL, the first tap over budget, and a guess of
the cause. The exit code is 0 for PASS, 1 for FAIL, 2 after an error. docs/compare.md is a tutorial.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from tclip_jax.schema import count, number

if TYPE_CHECKING:
    from etils import epath

    from tclip_jax.inference.model import Model
    from tclip_jax.keys import Recipe
    from tclip_jax.numerics.golden import Recording


class _Export(NamedTuple):
    """The files of an export for a runtime by tower, and what can be done with them."""

    files: dict[str, epath.Path]
    recipe: Callable[..., Recipe]
    rounds: Callable[..., bool]
    record: Callable[..., Recording]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the kinds of comparison and their options."""
    form = argparse.ArgumentParser(add_help=False)
    named = argparse.ArgumentParser(add_help=False)
    model = named.add_mutually_exclusive_group()
    model.add_argument("--preset", metavar="NAME", help="preset for a file without metadata, such as ViT-B-16")
    model.add_argument("--model-cfg", metavar="JSON", help="the same, as an open_clip configuration file")
    shown = form.add_mutually_exclusive_group()
    shown.add_argument("--all", action="store_true", help="also the table of all errors")
    shown.add_argument("--json", action="store_true", help="one JSON object with all errors instead of text")
    form.add_argument("--html", metavar="FILE", help="also write one self-contained page with plots")
    numbers = argparse.ArgumentParser(add_help=False)
    numbers.add_argument("--precision", default="highest", help="jax_default_matmul_precision (default: highest)")
    numbers.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype of the computation in JAX (default: float32)",
    )
    batch = argparse.ArgumentParser(add_help=False)
    batch.add_argument("--batch", type=count, default=4, metavar="N", help="number of images and of texts (default: 4)")
    batch.add_argument(
        "--via",
        choices=("auto", "torch", "jax"),
        default="auto",
        help="library that runs the reference (auto: onnxruntime for ONNX files; ai-edge-litert for LiteRT files;"
        " PyTorch if it is installed and the folder is of open_clip or transformers)",
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    weights = kinds.add_parser(
        "weights",
        parents=[named, form],
        help="compare values, trits and scales, tensor by tensor",
        epilog="Example: tclip compare weights runs/quickstart/artifact runs/quickstart/student",
    )
    activations = kinds.add_parser(
        "activations",
        parents=[named, form, numbers, batch],
        help="compare every tap of both towers, cumulative and isolated",
        epilog="Example: tclip compare activations runs/student export --html compare.html",
    )
    golden = kinds.add_parser(
        "golden",
        help="write or check a file of activations, for machines without PyTorch",
        epilog="Example: tclip compare golden dump export golden.safetensors",
    )
    actions = golden.add_subparsers(dest="action", metavar="ACTION", required=True)
    dump = actions.add_parser(
        "dump",
        parents=[named, numbers, batch],
        help="run a model and write its activations",
        epilog="Example: tclip compare golden dump export golden.safetensors",
    )
    check = actions.add_parser(
        "check",
        parents=[named, form, numbers],
        help="run a model and compare its activations with a file",
        epilog="Example: tclip compare golden check runs/student golden.safetensors",
    )
    inputs = kinds.add_parser(
        "inputs",
        parents=[named, form],
        help="compare tokens and pixels with those of open_clip and transformers",
        epilog="Example: tclip compare inputs runs/quickstart/artifact",
    )
    for command in (weights, activations):
        command.add_argument("a", metavar="A", help="the model to check")
        command.add_argument("b", metavar="B", help="the reference")
    for command in (dump, check, inputs):
        command.add_argument("model", metavar="MODEL", help="the model to run")
    for command in (dump, check):
        command.add_argument("file", metavar="FILE", help="file of activations")
    for command in (weights, activations, check):
        command.add_argument(
            "--budget",
            type=number(float, ge=0),
            help="largest relative error allowed (default: 2e-5; for weights 0; 0.1 for LiteRT and for ONNX of accuracy"
            " level 4)",
        )


def run(args: argparse.Namespace) -> int:
    """Print the report of a comparison, or write the golden file."""
    from tclip_jax.interop.checkpoints import is_checkpoint
    from tclip_jax.numerics.activations import BUDGET, activations_report
    from tclip_jax.numerics.configurations import differences
    from tclip_jax.numerics.golden import read_golden, write_golden
    from tclip_jax.numerics.inputs import inputs_report
    from tclip_jax.numerics.onnx_side import ROUNDED_BUDGET
    from tclip_jax.numerics.report import to_html, to_json, to_text
    from tclip_jax.numerics.weights import weights_report
    from tclip_jax.storage import write_atomic

    models = [args.a, args.b] if "a" in args else [args.model]
    if (args.preset or args.model_cfg) and not any(map(is_checkpoint, models)):
        raise ValueError(
            "--preset and --model-cfg are for a file that does not state its model; runs and artifacts state it"
        )
    if args.kind == "weights":
        ours, theirs = _load(args.a, args), _load(args.b, args)
        configurations = differences(_stated(args.a, ours), _stated(args.b, theirs))
        title = f"weights of {args.a} against {args.b}"
        report = weights_report(title, ours, theirs, args.budget or 0.0, configurations)
    elif args.kind == "inputs":
        report = inputs_report(_load(args.model, args), args.model)
    elif args.kind == "golden" and args.action == "dump":
        if (args.dtype, args.precision) != ("float32", "highest") and _in_torch(args.model, args.via):
            raise ValueError(f"--dtype and --precision apply to JAX, and PyTorch runs {args.model}: add --via jax")
        model = _load(args.model, args)
        recording = _record(args.model, model, model, args)
        facts = {"model": args.model, **recording.facts}
        write_golden(args.file, recording._replace(facts=facts, made_by=_stated(args.model, model)))
        print(f"{args.file}: {len(recording.taps)} taps, {args.batch} images and texts, {recording.facts['run by']}")
        return 0
    else:
        if args.kind == "golden":
            path, reference_path = args.model, args.file
            model, reference, rounded = _load(path, args), read_golden(reference_path), False
        else:
            path, reference_path = _reference_last(args)
            model = _load(path, args)
            reference = _reference(reference_path, model, _stated(path, model), args)
            export = _export(reference_path, args.via)
            rounded = export is not None and export.rounds(export.files)
        report = activations_report(
            f"activations of {path} against {reference_path}",
            model,
            reference,
            budget=(ROUNDED_BUDGET if rounded else BUDGET) if args.budget is None else args.budget,
            precision=args.precision,
            dtype=args.dtype,
            stated=_stated(path, model),
        )
    if args.html:
        write_atomic(args.html, to_html(report))
    print(json.dumps(to_json(report)) if args.json else to_text(report, tables=args.all))
    return 0 if report.passed else 1


def _load(path: str, args: argparse.Namespace) -> Model:
    from tclip_jax.inference.load import load_model
    from tclip_jax.interop.checkpoints import is_checkpoint

    return load_model(path, like=args.preset or args.model_cfg if is_checkpoint(path) else None)


def _stated(path: str, model: Model) -> Recipe:
    """Return what the files at `path` state about the model: without a default that stands for a missing file."""
    from tclip_jax.numerics.configurations import states_preprocess
    from tclip_jax.numerics.golden import model_recipe

    made_by = model_recipe(model)
    if not states_preprocess(path):
        del made_by["preprocess"]
    return made_by


def _reference(path: str, model: Model, stated: Recipe, args: argparse.Namespace) -> Recording:
    """Record the reference at `path`, with what it states; nothing is run if its taps have other shapes."""
    import numpy as np

    from tclip_jax.numerics.configurations import differences, folder_recipe, other_shapes
    from tclip_jax.numerics.golden import Recording
    from tclip_jax.numerics.torch_side import library_of

    loaded, unknown = None, dict[str, str]()
    if export := _export(path, args.via):
        made_by = export.recipe(export.files)
    elif _in_torch(path, args.via) and library_of(path):
        try:
            made_by = folder_recipe(path)
        except ValueError as error:  # the library itself may read it
            made_by, unknown = {}, {"configuration": f"not compared: {error}"}
    else:
        loaded = _load(path, args)
        made_by = _stated(path, loaded)
    if other_shapes(differences(stated, made_by)):
        nothing = np.zeros(0, np.float32)
        return Recording(nothing, nothing.astype(np.int32), {}, 1.0, {}, made_by)
    recording = _record(path, loaded, model, args)
    return recording._replace(facts={**recording.facts, **unknown}, made_by=made_by)


def _reference_last(args: argparse.Namespace) -> tuple[str, str]:
    """Return A and B, exchanged if another library runs only A, so that this library is the reference."""
    elsewhere = [bool(_export(path, args.via)) or _in_torch(path, args.via) for path in (args.a, args.b)]
    return (args.b, args.a) if elsewhere == [True, False] else (args.a, args.b)


def _export(path: str, via: str) -> _Export | None:
    """Return the export for a runtime at `path`; None if there is none, or `via` names another library."""
    from tclip_jax.numerics.litert_side import litert_files, litert_recipe, record_litert
    from tclip_jax.numerics.onnx_side import onnx_files, onnx_recipe, record_onnx, rounds_activations

    if via != "auto":
        return None
    if files := onnx_files(path):
        return _Export(files, onnx_recipe, rounds_activations, record_onnx)
    if files := litert_files(path):
        return _Export(files, litert_recipe, lambda _: True, record_litert)
    return None


def _in_torch(path: str, via: str) -> bool:
    from tclip_jax.numerics.torch_side import library_of

    return via == "torch" or (
        via == "auto" and bool(library_of(path)) and importlib.util.find_spec("torch") is not None
    )


def _record(path: str, loaded: Any, model: Model, args: argparse.Namespace) -> Recording:
    """Record the activations of the model at `path`, on sample inputs made for `model`.

    Args:
      path: the model to run.
      loaded: the same model, a `Model`; None if a library of PyTorch loads the folder itself.
      model: the model whose preprocessing and tokens the inputs have.
      args: the options.
    """
    from tclip_jax.numerics.activations import record
    from tclip_jax.numerics.inputs import sample_batch
    from tclip_jax.numerics.torch_side import build_torch, library_of, load_torch, record_torch

    pixels, tokens = sample_batch(model, args.batch)
    if export := _export(path, args.via):
        return export.record(export.files, model.config, pixels, tokens)
    if not _in_torch(path, args.via):
        return record(loaded, pixels, tokens, precision=args.precision, dtype=args.dtype)
    module = load_torch(path) if library_of(path) else build_torch(loaded)
    return record_torch(module, model.config, pixels, tokens)
