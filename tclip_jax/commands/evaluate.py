"""Example:
tclip evaluate runs/quickstart/artifact --data digits --split test --templates digits
"""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and what it classifies."""
    parser.add_argument("model", metavar="MODEL", help="workdir of a run, or an artifact")
    parser.add_argument("--data", required=True, help="labelled source: digits, folder:<path>, tfds:<name>")
    parser.add_argument("--split", default="test")
    parser.add_argument("--templates", default="simple", help="name of a list of captions with {c} (default: simple)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a line")


def run(args: argparse.Namespace) -> None:
    """Prints accuracy, number of images and unreadable images."""
    from tclip_jax.data.sources import open_source
    from tclip_jax.evaluation.zero_shot import classify
    from tclip_jax.training.restore import load_model

    outcome = classify(load_model(args.model), open_source(args.data, args.split), args.templates, args.batch_size)
    figures = {"accuracy": outcome.accuracy, "images": len(outcome.labels), "unreadable": outcome.unreadable}
    unreadable = f", {outcome.unreadable} unreadable" if outcome.unreadable else ""
    line = f"zero-shot accuracy {outcome.accuracy:.2%} of {len(outcome.labels)} images{unreadable}"
    print(json.dumps(figures) if args.json else line)
