"""Examples:
  tclip export runs/student --out export
  tclip export runs/student --to onnx,open_clip,hf --out release
  tclip export runs/student --to gguf-tq1_0,gguf-tq2_0 --out release
  tclip export runs/student --to litert --out phone
  tclip export runs/student --to stablehlo --out programs
`python export/check.py` compares their outputs with those of JAX. See docs/interchange.md, docs/deploy.md on ONNX,
LiteRT, browsers and packed PyTorch, and docs/hub.md on StableHLO.
"""

from __future__ import annotations

import argparse

from tclip_jax.schema import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the model, the formats and the folder."""
    from tclip_jax.interop.formats import ACCURACY_LEVELS, DTYPES, FORMATS

    parser.add_argument("model", metavar="MODEL", help="workdir of a run, an artifact, or a source of `tclip import`")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    formats = "; ".join(f"{name}: {form.does}" for name, form in FORMATS.items())
    parser.add_argument(
        "--to",
        default="open_clip,hf",
        metavar="FORMATS",
        help=f"formats separated by commas (default: open_clip,hf). {formats}",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the floats of open_clip, hf, big_vision and onnx, and of onnx's scales (default: float32)",
    )
    parser.add_argument(
        "--accuracy-level",
        type=int,
        choices=ACCURACY_LEVELS,
        help="of 2-bit products in ONNX Runtime. 4 rounds activations to int8; 1 is exact and slow (default: 4)",
    )
    parser.add_argument(
        "--batch",
        type=count,
        metavar="N",
        help="images or texts that a file of litert takes; no other number fits (default: 1)",
    )
    parser.add_argument(
        "--demo", action="store_true", help="add a page to onnx that classifies and searches pictures in a browser"
    )
    parser.add_argument(
        "--onnxruntime-web",
        metavar="PATH",
        help="npm package that --demo copies, or a folder with it in node_modules (default: the page loads it from"
        " cdn.jsdelivr.net)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing export")


def run(args: argparse.Namespace) -> None:
    """Export the model, and print each file with its size and what runs it."""
    from tclip_jax.inference.load import load_packed
    from tclip_jax.interop.export import export_model
    from tclip_jax.interop.formats import FORMATS
    from tclip_jax.pages import aligned

    formats = args.to.split(",")
    if args.dtype and not any(FORMATS[name].dtypes for name in formats if name in FORMATS):
        takers = ", ".join(name for name, form in FORMATS.items() if form.dtypes)
        raise ValueError(f"--dtype is for {takers}, and --to is {args.to}: the other formats fix their dtypes")
    if args.accuracy_level and "onnx" not in formats:
        raise ValueError(f"--accuracy-level is for onnx, and --to is {args.to}")
    if args.batch and "litert" not in formats:
        raise ValueError(f"--batch is for litert, and --to is {args.to}: the other formats take any number")
    if args.demo and "onnx" not in formats:
        raise ValueError(f"--demo is for onnx, and --to is {args.to}")
    if args.onnxruntime_web and not args.demo:
        raise ValueError("--onnxruntime-web is for --demo, which is not there")
    model = load_packed(args.model)
    exported = export_model(
        args.out,
        config=model.config,
        preprocess=model.preprocess,
        params=model.params,
        tokenizer=model.tokenizer,
        formats=formats,
        dtype=args.dtype or "float32",
        accuracy_level=args.accuracy_level or 4,
        batch=args.batch or 1,
        figures=model.figures,
        provenance=model.provenance,
        check=not {"open_clip", "hf"}.isdisjoint(formats),
        demo=args.demo,
        demo_runtime=args.onnxruntime_web,
        overwrite=args.overwrite,
    )
    rows = [[f"{args.out}/{file}", f"{size / 1e6:.1f} MB", runs] for file, size, runs in exported.files]
    print("\n".join([*aligned(rows, right=False), *exported.notes]))
    print(f"{args.out}: {', '.join(formats)}; see README.md there to load it")
