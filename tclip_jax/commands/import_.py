"""Examples:
  tclip import hf-hub:laion/CLIP-ViT-L-14-laion2B-s32B-b82K --out teacher
  tclip import ViT-B-16.pt --preset ViT-B-16-quickgelu --out openai

A source is a repository of the Hugging Face hub, a folder of open_clip or transformers, a file of open_clip, an archive
of OpenAI, a GGUF file, or an .npz of big_vision. Weights that are exactly scale · trit are stored as trits and scales,
all others as floats.
"""

from __future__ import annotations

import argparse
import functools
from typing import TYPE_CHECKING

from tclip_jax.schema import count

if TYPE_CHECKING:
    from tclip_jax.interop.recover import NotTernaryError
    from tclip_jax.ternary import TernaryTensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the source, the artifact, and the model of a source that does not state it."""
    parser.add_argument("source", metavar="SOURCE", help="hf-hub:org/name[@revision], a folder, or a file")
    parser.add_argument("--out", required=True, metavar="DIR", help="the artifact, a new folder")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--preset", metavar="NAME", help="preset for a file without metadata, such as ViT-B-16")
    model.add_argument("--model-cfg", metavar="JSON", help="the same, as an open_clip configuration file")
    parser.add_argument(
        "--image-size", type=count, metavar="N", help="interpolate the position embeddings to this image size"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="what tokenizes texts, if the source has no tokenizer: a folder with tokenizer.json or spiece.model and"
        " tokenizer_config.json, an artifact or a run",
    )
    parser.add_argument("--ternary", choices=("auto", "no"), default="auto", help="recover trits (default: auto)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="dtype of float parameters (default: float32)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing artifact")


def run(args: argparse.Namespace) -> None:
    """Write the artifact, and print which parameters are ternary."""
    from tclip_jax.artifacts.inspection import weight_bytes
    from tclip_jax.inference.load import load_tokenizer
    from tclip_jax.interop.importing import import_checkpoint

    recovered = import_checkpoint(
        args.source,
        args.out,
        like=args.preset or args.model_cfg,
        image_size=args.image_size,
        tokenizer=functools.partial(load_tokenizer, args.tokenizer) if args.tokenizer else None,
        ternary=args.ternary == "auto",
        rest_dtype=args.dtype,
        overwrite=args.overwrite,
    )
    print(recovery_table(recovered))
    print(f"{args.out}: {weight_bytes(args.out):,} bytes of weights")


def recovery_table(recovered: dict[str, TernaryTensor | NotTernaryError]) -> str:
    """Return a table with the group and the scale bits of each parameter, or the reason why it is float."""
    from tclip_jax.interop.recover import scale_bits
    from tclip_jax.ternary import TernaryTensor

    if not any(isinstance(outcome, TernaryTensor) for outcome in recovered.values()):
        return "float weights: none is scale · trit" if recovered else "float weights: --ternary no"
    width = max(map(len, recovered))
    lines = [f"{'ternary':{width}}  {'group':>7}  scale bits  zeros"]
    for path, outcome in recovered.items():
        if isinstance(outcome, TernaryTensor):
            zeros = 1 - (outcome.trits != 0).mean()
            lines.append(f"{path:{width}}  {_granularity(outcome):>7}  {scale_bits(outcome.scale):10}  {zeros:5.1%}")
        else:
            lines.append(f"{path:{width}}    float: {outcome}")
    return "\n".join(lines)


def _granularity(t: TernaryTensor) -> str:
    if t.scale.shape[-2:] == (1, 1):
        return "tensor"
    return "channel" if t.scale.shape[t.axis] == 1 else str(t.group)
