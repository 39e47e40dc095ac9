"""Examples:
  tclip embed runs/quickstart/artifact --images pictures --out pictures.npy
  tclip embed runs/quickstart/artifact --texts captions.txt --out captions.parquet

Embeddings are L2-normalised float32 vectors, in the order of the inputs. For x.npy the names of the inputs are in
x.names.json. Rerun an interrupted command to resume from OUT.partial. An input that cannot be used is reported and left
out; the exit code is then 1.
"""

from __future__ import annotations

import argparse

from tclip_jax.commands.classify import add_batch_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the model, the inputs and the output."""
    parser.add_argument("model", metavar="MODEL", help="workdir of a run, or an artifact")
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--images", nargs="+", metavar="PATH", help="image files and folders of images")
    inputs.add_argument("--texts", metavar="FILE", help="UTF-8 text file with one text per line")
    parser.add_argument("--out", required=True, metavar="FILE", help="the output, x.npy or x.parquet")
    add_batch_arguments(parser, "inputs")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> int:
    """Write the embeddings of all inputs that can be used."""
    from etils import epath

    from tclip_jax.inference.embed import (
        Store,
        checked_output,
        embed_images,
        embed_texts,
        embeddings_mark,
        write_embeddings,
    )
    from tclip_jax.inference.inputs import find_images, find_texts, image_items, log_failures, text_items
    from tclip_jax.inference.load import load_model

    out = checked_output(args.out)
    if out.exists() and not args.overwrite:
        raise FileExistsError(f"{out} exists: choose another file, or add --overwrite")
    if args.images:
        folders = {path: epath.Path(path).is_dir() for path in args.images}
        paths = [
            image for path in args.images for image in (find_images(path) if folders[path] else [epath.Path(path)])
        ]
        inputs = len(paths)
    else:
        texts, blank = find_texts(args.texts)
        inputs = len(texts) + blank
    model = load_model(args.model).repacked(activations=args.activations)
    width, mark = model.config.embed_dim, embeddings_mark(model, args.model)
    store = Store(f"{out}.partial", width)
    if args.images:
        items, failures = image_items(mark, paths)
        failures += embed_images(model, items, store, args.batch_size)
    else:
        items = text_items(mark, texts)
        failures = embed_texts(model, items, store, args.batch_size)
    log_failures(failures)
    if not any(item.key in store for item in items):
        raise ValueError(f"nothing to embed: none of {inputs} inputs can be used")
    written = write_embeddings(out, items, store, width)
    store.remove()
    left_out = inputs - written
    print(f"{out}: {written:,} embeddings of {width} float32" + (f", {left_out:,} left out" if left_out else ""))
    return 1 if left_out else 0
