"""Examples:
  tclip export runs/student --out export
  tclip export runs/student --to open_clip,hf,gguf-tq1_0,gguf-tq2_0 --out release

The folder loads as open_clip.create_model_and_transforms("local-dir:export") and CLIPModel.from_pretrained("export"),
and `python export/check.py` compares what they compute with JAX. docs/interchange.md has more.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the formats and where to write."""
    parser.add_argument("model", metavar="MODEL", help="workdir of a run, an artifact, or what `tclip import` reads")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--to",
        default="open_clip,hf",
        metavar="FORMATS",
        help="any of open_clip, hf (transformers), gguf-tq1_0 and gguf-tq2_0 (default: open_clip,hf)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights for open_clip and transformers (default: float32)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the export that is there")


def run(args: argparse.Namespace) -> None:
    """Exports the dequantised weights, and to GGUF the trits and scales."""
    from tclip_jax.inference.load import load_packed
    from tclip_jax.interop.export import export_pytorch

    formats = args.to.split(",")
    floats = not {"open_clip", "hf"}.isdisjoint(formats)
    if args.dtype and not floats:
        raise ValueError(f"--dtype is of the weights for open_clip and hf, and --to is {args.to}: GGUF has its own")
    model = load_packed(args.model)
    export_pytorch(
        args.out,
        config=model.config,
        preprocess=model.preprocess,
        params=model.params,
        formats=formats,
        dtype=args.dtype or "float32",
        figures=model.figures,
        provenance=model.provenance,
        check=floats,
        overwrite=args.overwrite,
    )
    print(f"{args.out}: {', '.join(formats)}; its README.md says how to load it")
