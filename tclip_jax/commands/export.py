"""Examples:
  tclip export runs/student --out export
  tclip export runs/student --to open_clip,hf,gguf-tq1_0,gguf-tq2_0 --out release
  tclip export runs/student --to stablehlo --out programs

open_clip.create_model_and_transforms("local-dir:export") and CLIPModel.from_pretrained("export") load the folder.
`python export/check.py` compares their outputs with those of JAX. `stablehlo` holds
both towers as programs that need jax alone. See docs/interchange.md and docs/hub.md.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the model, the formats and the folder."""
    parser.add_argument("model", metavar="MODEL", help="workdir of a run, an artifact, or a source of `tclip import`")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--to",
        default="open_clip,hf",
        metavar="FORMATS",
        help="open_clip, hf (transformers), gguf-tq1_0, gguf-tq2_0, stablehlo (jax.export), separated by commas"
        " (default: open_clip,hf)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights for open_clip and transformers (default: float32)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing export")


def run(args: argparse.Namespace) -> None:
    """Export the model: dequantised weights, and for GGUF and StableHLO trits and scales."""
    from tclip_jax.inference.load import load_packed
    from tclip_jax.interop.export import export_pytorch

    formats = args.to.split(",")
    floats = not {"open_clip", "hf"}.isdisjoint(formats)
    if args.dtype and not floats:
        raise ValueError(f"--dtype is for open_clip and hf, and --to is {args.to}: the others fix their dtypes")
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
    print(f"{args.out}: {', '.join(formats)}; see README.md there to load it")
