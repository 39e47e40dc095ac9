"""Example:
  tclip export runs/student --out export

The folder loads as open_clip.create_model_and_transforms("local-dir:export") and CLIPModel.from_pretrained("export").
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and where to write."""
    parser.add_argument("model", metavar="MODEL", help="workdir of a run, or an artifact")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")


def run(args: argparse.Namespace) -> None:
    """Exports the dequantised weights."""
    from tclip_jax.artifacts.pack import pack_params
    from tclip_jax.interop.export import export_pytorch
    from tclip_jax.training.restore import load_model

    model = load_model(args.model)
    params = pack_params(model.params, model.rules)
    export_pytorch(args.out, config=model.config, preprocess=model.preprocess, params=params)
    print(f"{args.out}: loads in open_clip (local-dir:{args.out}) and transformers (CLIPModel.from_pretrained)")
