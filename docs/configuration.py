"""Write docs/configuration.md from the declarations of the keys: `python docs/configuration.py`."""

from __future__ import annotations

import dataclasses
import pathlib
import typing
from typing import Any

from tclip_jax.models.config import TextConfig, VisionConfig
from tclip_jax.runs.config import EvalConfig, GroupConfig, RunConfig
from tclip_jax.schema import Bounds, describe, key_of
from tclip_jax.ternary import Quantizer

PAGE = pathlib.Path(__file__).with_suffix(".md")
HEAD = """# Configuration

This page lists every key of a run, with its type, default and bounds. `python docs/configuration.py` generates it from
the declarations in [config.py](../tclip_jax/runs/config.py). A recipe changes the defaults, and options such as
`--config.loss.crd=2.0` override the recipe. A run refuses an unknown key, a value of another type, and a value out of
bounds, before it writes anything. Numbers must be finite.
"""
POWERS = {str(2**31 - 1): "2³¹ − 1", str(2**32): "2³²"}


def page() -> str:
    """Returns the page as Markdown."""
    sections = [field for field in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(field.default)]
    top = [field for field in dataclasses.fields(RunConfig) if field not in sections]
    parts = [HEAD, "## The run\n", _table(RunConfig, top)]
    for field in sections:
        parts += [f"## `{field.name}`\n", _first_line(type(field.default)), _table(type(field.default))]
    parts += ["## Each of `evals`\n", "The keys of `eval`, and a name.\n", _table(EvalConfig)]
    parts += ["## Each of `optimizer.groups`\n", _first_line(GroupConfig), _table(GroupConfig)]
    parts += ["## `model.vision_cfg`\n", _first_line(VisionConfig), _table(VisionConfig)]
    parts += ["## `model.text_cfg`\n", _first_line(TextConfig), _table(TextConfig)]
    return "\n".join(parts)


def _first_line(cls: type) -> str:
    if cls is Quantizer:
        return "[Training](training.md#which-weights-and-how) explains these keys.\n"
    return f"{(cls.__doc__ or '').partition(chr(10))[0]}\n"


def _table(cls: type, fields: list[dataclasses.Field[Any]] | None = None) -> str:
    hints = typing.get_type_hints(cls)
    lines = ["| key | type | default | bounds | what |", "|---|---|---|---|---|"]
    for field in fields or dataclasses.fields(cls):
        declared = key_of(field)
        bounds = "" if declared.bounds == Bounds() else str(declared.bounds)
        for digits, power in POWERS.items():
            bounds = bounds.replace(digits, power)
        default = "of the preset `tiny`" if declared.written else f"`{field.default!r}`"
        cells = (f"`{field.name}`", describe(hints[field.name]), default, bounds, declared.doc)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
