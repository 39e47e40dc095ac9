"""Examples:
  tclip classify runs/quickstart/artifact pictures/*.png --labels "three,eight" --templates digits
  tclip classify runs/quickstart/artifact cat.jpg --labels-file labels.txt --templates "a photo of a {c}." "{c}"

An image that cannot be read is reported and left out; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from tclip_jax.data.prompts import DEFAULT, parse_templates
from tclip_jax.schema import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the model, the images and the labels."""
    parser.add_argument("model", metavar="MODEL", help="workdir of a run, or an artifact")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", metavar="A,B,…", help="labels separated by commas")
    labels.add_argument("--labels-file", metavar="FILE", help="UTF-8 text file with one label per line")
    add_template_arguments(parser, "captions of the labels")
    add_batch_arguments(parser, "images")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of lines")


def add_batch_arguments(parser: argparse.ArgumentParser, inputs: str) -> None:
    """Add --batch-size and --activations, for commands that encode with packed weights."""
    parser.add_argument("--batch-size", type=count, default=64, help=f"{inputs} per batch (default: 64)")
    parser.add_argument(
        "--activations",
        choices=("A32", "A16", "A8"),
        help="bits of the activations of packed products: fewer are faster and less exact (default: A16 where it is"
        " fast, else A32)",
    )


def add_template_arguments(parser: argparse.ArgumentParser, captions: str) -> None:
    """Add --templates, for commands that make captions from class names.

    Args:
      captions: start of the help text, which names the captions.
    """
    parser.add_argument(
        "--templates",
        nargs="+",
        default=[],
        metavar="T",
        help=f"{captions}: the name of a list of templates, or templates that contain {{c}} (default: {DEFAULT})",
    )


def run(args: argparse.Namespace) -> int:
    """Print the most probable labels of each image."""
    from tclip_jax.inference.classify import Guess, classify_images, guess_table
    from tclip_jax.inference.inputs import Failure, find_texts, log_failures
    from tclip_jax.inference.load import load_model

    if args.labels_file:
        labels, _ = find_texts(args.labels_file)
    else:
        labels = [label.strip() for label in args.labels.split(",")]
        if len(labels) == 1 and (labels[0].endswith(".txt") or pathlib.Path(labels[0]).is_file()):
            raise ValueError(
                f"--labels {labels[0]} is one label: for a file of labels, write --labels-file {labels[0]}"
            )
    templates = parse_templates(args.templates) or DEFAULT
    model = load_model(args.model).repacked(activations=args.activations)
    outcomes = classify_images(model, args.images, labels, templates, args.batch_size)
    guesses = [outcome for outcome in outcomes if isinstance(outcome, Guess)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    if args.json:
        print(json.dumps([_fields(outcome) for outcome in outcomes]))
    elif guesses:
        print(guess_table(guesses))
    log_failures(failures)
    return 1 if failures else 0


def _fields(outcome: object) -> dict[str, object]:
    from tclip_jax.inference.classify import Guess
    from tclip_jax.inference.inputs import Failure
    from tclip_jax.pages import printable

    if isinstance(outcome, Guess):
        return {"image": printable(outcome.name), "labels": outcome.labels}
    assert isinstance(outcome, Failure)
    return {"image": printable(outcome.name), "error": outcome.reason}
