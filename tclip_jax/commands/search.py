"""Examples:
  tclip search index runs/quickstart/artifact pictures --out pictures.index
  tclip search query pictures.index "a handwritten digit three." --top 20 --html three.html
  tclip search query pictures.index pictures/0007.png

A query that is a file is a picture; one with the suffix of a picture or a / that is no file is refused, and all else
is a text. --text and --image say it.
Indexing again brings the index up to date: only files that are new or changed are embedded. A picture that cannot be
read is named and left out; the exit code is then 1. The page holds its pictures and loads nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from tclip_jax.schema import count

if TYPE_CHECKING:
    from etils import epath


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """To index a folder, or to query an index."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    index = actions.add_parser("index", help="embed the pictures of a folder and all below it")
    index.add_argument("model", metavar="MODEL", help="workdir of a run, or an artifact")
    index.add_argument("folder", metavar="FOLDER")
    index.add_argument("--out", required=True, metavar="INDEX", help="a folder: new, or an index to bring up to date")
    index.add_argument("--batch-size", type=count, default=64)
    query = actions.add_parser("query", help="the pictures nearest to a text or a picture")
    query.add_argument("index", metavar="INDEX")
    query.add_argument("query", metavar="TEXT_OR_IMAGE", help="an image file, or else a text")
    kind = query.add_mutually_exclusive_group()
    kind.add_argument("--text", action="store_true", help="it is a text, whatever it looks like")
    kind.add_argument("--image", action="store_true", help="it is an image file")
    query.add_argument("--top", type=count, default=20, metavar="N", help="results (default: 20)")
    query.add_argument("--model", metavar="MODEL", help="where the model of the index is now")
    form = query.add_mutually_exclusive_group()
    form.add_argument("--html", metavar="FILE", help="also write one page with the pictures in it")
    form.add_argument("--json", action="store_true", help="one JSON list instead of lines")


def run(args: argparse.Namespace) -> int:
    """Indexes or queries, and returns the exit code."""
    return _index(args) if args.action == "index" else _query(args)


def _index(args: argparse.Namespace) -> int:
    from tclip_jax.inference.load import load_model
    from tclip_jax.inference.search import build_index
    from tclip_jax.pages import printable

    where = args.model if "://" in args.model else os.path.abspath(args.model)
    model = load_model(args.model).repacked()
    outcome = build_index(model, args.folder, args.out, model_path=where, batch_size=args.batch_size)
    for failure in outcome.failures:
        print(printable(f"{failure.name}: {failure.reason}"), file=sys.stderr)
    left_out = f", {len(outcome.failures)} left out" if outcome.failures else ""
    print(f"{args.out}: {outcome.count:,} pictures, {outcome.reused:,} of them unchanged{left_out}")
    return 1 if outcome.failures else 0


def _query(args: argparse.Namespace) -> int:
    from tclip_jax.inference.load import load_model
    from tclip_jax.inference.search import query_index, read_index, results_page
    from tclip_jax.pages import printable
    from tclip_jax.storage import write_atomic

    index = read_index(args.index)
    picture = _picture(args)
    where = args.model or index.model
    results = query_index(load_model(where).repacked(), index, picture or args.query, args.top, model_path=where)
    if args.json:
        print(json.dumps([{"image": printable(result.name), "similarity": result.score} for result in results]))
        return 0
    for rank, result in enumerate(results, 1):
        print(f"{rank:3}  {result.score:6.3f}  {printable(result.name)}")
    if args.html:
        facts = f"{len(results)} of {len(index.names):,} pictures of {index.root}, by cosine similarity"
        found = [(index.root / result.name, result.name, result.score) for result in results]
        write_atomic(args.html, results_page(args.query, facts, found, picture))
    return 0


def _picture(args: argparse.Namespace) -> epath.Path | None:
    """The picture that is looked for; None of a text.

    Raises:
      FileNotFoundError: a name that can only be meant for a picture, and is none.
      ValueError: an empty query.
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
        what = "a folder, not an image file" if path.is_dir() else "no such image file"
        raise FileNotFoundError(f"{args.query}: {what}; to look for it as a text, add --text")
    return None
