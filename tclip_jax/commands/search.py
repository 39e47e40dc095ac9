"""Examples:
  tclip search index runs/quickstart/artifact pictures --out pictures.index
  tclip search query pictures.index "a handwritten digit three." --top 20 --html three.html
  tclip search query pictures.index pictures/0007.png

A query that names a file is an image; any other query is a text. A query with a / or with the suffix of an image is
refused if no such file exists. --text and --image set the kind of the query.
Index a folder again to update its index: only new and changed files are embedded. An image that cannot be read is
reported and left out; the exit code is then 1. The HTML page contains its images and loads nothing.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING

from tclip_jax.commands.classify import add_batch_arguments
from tclip_jax.schema import count

if TYPE_CHECKING:
    from etils import epath


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions `index` and `query` and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    index = actions.add_parser(
        "index",
        help="embed the images of a folder and its subfolders",
        epilog="Example: tclip search index runs/quickstart/artifact pictures --out pictures.index",
    )
    index.add_argument("model", metavar="MODEL", help="workdir of a run, or an artifact")
    index.add_argument("folder", metavar="FOLDER", help="folder of images")
    index.add_argument("--out", required=True, metavar="INDEX", help="folder of the index, new or to update")
    add_batch_arguments(index, "images")
    query = actions.add_parser(
        "query",
        help="find the images nearest to a text or an image",
        epilog='Example: tclip search query pictures.index "a handwritten digit three." --top 20',
    )
    query.add_argument("index", metavar="INDEX", help="folder of an index")
    query.add_argument("query", metavar="TEXT_OR_IMAGE", help="an image file or a text")
    kind = query.add_mutually_exclusive_group()
    kind.add_argument("--text", action="store_true", help="the query is a text")
    kind.add_argument("--image", action="store_true", help="the query is an image file")
    query.add_argument("--top", type=count, default=20, metavar="N", help="number of results (default: 20)")
    query.add_argument("--model", metavar="MODEL", help="path of the index's model, if it was moved")
    form = query.add_mutually_exclusive_group()
    form.add_argument("--html", metavar="FILE", help="also write a page that contains the images")
    form.add_argument("--json", action="store_true", help="one JSON list instead of lines")


def run(args: argparse.Namespace) -> int:
    """Update or query an index."""
    return _index(args) if args.action == "index" else _query(args)


def _index(args: argparse.Namespace) -> int:
    from tclip_jax.inference.inputs import log_failures
    from tclip_jax.inference.load import load_model
    from tclip_jax.inference.search import build_index

    path = args.model if "://" in args.model else os.path.abspath(args.model)
    model = load_model(args.model).repacked(activations=args.activations)
    outcome = build_index(model, args.folder, args.out, model_path=path, batch_size=args.batch_size)
    log_failures(outcome.failures)
    left_out = f", {len(outcome.failures)} left out" if outcome.failures else ""
    print(f"{args.out}: {outcome.count:,} images, {outcome.reused:,} of them unchanged{left_out}")
    return 1 if outcome.failures else 0


def _query(args: argparse.Namespace) -> int:
    from tclip_jax.inference.load import load_model
    from tclip_jax.inference.search import query_index, read_index, results_page
    from tclip_jax.pages import printable
    from tclip_jax.storage import write_atomic

    index = read_index(args.index)
    image = _query_image(args)
    path = args.model or index.model
    model = load_model(path).repacked(activations=index.activations)
    results = query_index(model, index, image or args.query, args.top, model_path=path)
    if args.json:
        print(json.dumps([{"image": printable(result.name), "similarity": result.score} for result in results]))
        return 0
    for rank, result in enumerate(results, 1):
        print(f"{rank:3}  {result.score:6.3f}  {printable(result.name)}")
    if args.html:
        facts = f"{len(results)} of {len(index.names):,} images of {index.root}, by cosine similarity"
        matches = [(index.root / result.name, result.name, result.score) for result in results]
        write_atomic(args.html, results_page(args.query, facts, matches, image))
    return 0


def _query_image(args: argparse.Namespace) -> epath.Path | None:
    """Return the path of the image that is the query, or None if the query is a text.

    Raises:
      FileNotFoundError: the query looks like the path of an image, but names no file.
      ValueError: the query is empty.
    """
    from etils import epath

    from tclip_jax.data.files import is_image

    if not args.query.strip():
        raise ValueError("the query is empty: it must be a text or an image file")
    if args.text:
        return None
    path = epath.Path(args.query).expanduser()
    if args.image or "://" in args.query or path.is_file():
        return path
    if is_image(args.query) or os.sep in args.query:
        reason = "a folder, not an image file" if path.is_dir() else "no such image file"
        raise FileNotFoundError(f"{args.query}: {reason}; add --text to search for it as a text")
    return None
