"""Examples:
  tclip sensitivity runs/teacher --data digits --split test --plot sensitivity.png
  tclip sensitivity runs/teacher --data digits --split test --bits 4
  tclip sensitivity runs/teacher --data digits --split test --by block --pairs 512 --json

Each row quantizes one part of the model, to trits by the run's quantizers or uniformly to 4 bits, and keeps all other
weights as the floats that training updates. The loss is the contrastive loss of the run, without its teacher, over
held-out pairs in fixed batches. --bits proposes config.ternary, with the parameters that cost most loss for each bit in
4 bits, or as floats of 16 bits.
"""

from __future__ import annotations

import argparse
import io
import json
import pathlib

from tclip_jax.schema import count, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the run, the data, the parts and the output."""
    parser.add_argument("run", metavar="RUN", help="workdir of a run, optionally with a step (RUN/checkpoints/100)")
    parser.add_argument(
        "--data", metavar="SOURCE", help="held-out pairs, as in config.data.source (default: those of config.eval)"
    )
    parser.add_argument("--split", help="split of --data (default: test)")
    parser.add_argument("--templates", help="captions for class names of --data")
    parser.add_argument(
        "--by",
        choices=("parameter", "matrix", "block"),
        default="parameter",
        help="what is quantized together: all layers of a parameter, one matrix, or one block (default: parameter)",
    )
    parser.add_argument("--batch-size", type=count, default=128, metavar="N", help="pairs per batch (default 128)")
    parser.add_argument(
        "--pairs", type=number(int, ge=0), default=1024, metavar="N", help="the most pairs; 0: all (default 1024)"
    )
    parser.add_argument(
        "--bits", type=number(float, gt=0), metavar="X", help="propose config.ternary within X mean bits of a weight"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="also write a plot: .png, .svg, ...")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> None:
    """Print the table or the JSON object, and write the plot."""
    if args.bits and args.by != "parameter":
        raise ValueError("--bits proposes rules, which select whole parameters: use it without --by")
    for option in ("split", "templates"):
        if getattr(args, option) is not None and not args.data:
            raise ValueError(f"--{option} is of --data: name its source too, or leave the split of config.eval")
    form = _form(args.plot) if args.plot else ""

    from tclip_jax.parallel.mesh import make_mesh
    from tclip_jax.runs.config import EvalConfig
    from tclip_jax.runs.read import read_weights
    from tclip_jax.storage import write_atomic
    from tclip_jax.training import sensitivity

    mesh = make_mesh()
    _, run, params = read_weights(args.run, mesh)
    if args.bits:
        sensitivity.check_budget(sensitivity.parts_of(run, params, args.by), args.bits)
    where = (args.data, args.split or "test", args.templates or "")
    if not args.data:
        where = (run.eval.source, run.eval.split, run.eval.templates)
    if not where[0] or (not args.data and run.eval.suite):
        raise ValueError("--data is missing, and config.eval of the run has no source: name held-out pairs")
    source, split, templates = where
    config = EvalConfig("loss", source, split=split, templates=templates, batch_size=args.batch_size)
    loss = sensitivity.validation_loss(sensitivity.float_run(run), mesh, config, pairs=args.pairs)
    measured = sensitivity.measure(run, params, loss, args.by)
    proposed = sensitivity.propose_rules(run, measured, args.bits) if args.bits else None
    if args.plot:
        buffer = io.BytesIO()
        sensitivity.plot_sensitivity(measured).savefig(buffer, format=form)
        write_atomic(args.plot, buffer.getvalue())
    if args.json:
        rows = [row.part._asdict() | {"rises": row.rises} for row in measured.rows]
        within = {"ternary": proposed[0], "bits": proposed[1]} if proposed else None
        print(json.dumps({"float_loss": measured.float_loss, "rows": rows, "proposed": within}))
        return
    print(sensitivity.sensitivity_text(measured))
    if proposed:
        rules, bits = proposed
        print(f"\n{bits:.2f} bits a weight; parameters without a rule have 16 bits:\n--config.ternary={rules!r}")


def _form(plot: str) -> str:
    """Return the format of a plot by the suffix of its file; raise ValueError if it cannot be drawn."""
    from matplotlib.figure import Figure

    form = pathlib.PurePath(plot).suffix.removeprefix(".").lower() or "png"
    known = Figure().canvas.get_supported_filetypes()
    if form not in known:
        raise ValueError(f"--plot {plot}: no plot has the suffix .{form}: there are {', '.join(sorted(known))}")
    return form
