"""Writes docs/configuration.md from the declarations: `python docs/configuration.py`."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from tclip_jax.data.images import Preprocess
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.runs.config import GroupConfig, RunConfig
from tclip_jax.runs.reference import KeyReference, key_references, keys_of
from tclip_jax.ternary import Quantizer

PAGE = pathlib.Path(__file__).with_suffix(".md")
HEAD = """# Configuration

Every key of a run, with its type, default and bounds. `python docs/configuration.py` generates this page from the
declarations in [config.py](../tclip_jax/runs/config.py). A recipe sets keys, and the command line overrides them:
`--config.loss.crd=2.0`. A key that is unknown, has the wrong type or is out of bounds is refused before anything is
written. Numbers are finite. `tclip config RECIPE` prints the same for a recipe, with its values.
"""
_CLASSES = {
    "": RunConfig,
    "model": CLIPConfig,
    "model.vision_cfg": VisionConfig,
    "model.text_cfg": TextConfig,
    "preprocess": Preprocess,
}


def page() -> str:
    """The whole page."""
    parts, sections = [HEAD], dict.fromkeys(key.section for key in key_references())
    for section in sections:
        cls = _CLASSES.get(section) or type(getattr(RunConfig, section))
        keys = [key for key in key_references() if key.section == section]
        parts += [f"## `{section}`\n" if section else "## The run\n", _first_line(cls), _table(keys)]
    parts += ["## Each of `evals`\n", "The keys of `eval`, and a name.\n"]
    return "\n".join(
        [*parts, "## Each of `optimizer.groups`\n", _first_line(GroupConfig), _table(keys_of(GroupConfig))]
    )


def _first_line(cls: type) -> str:
    if cls is Quantizer:
        return "Which is explained in [training](training.md#which-weights-and-how).\n"
    return f"{(cls.__doc__ or '').partition(chr(10))[0]}\n"


def _table(keys: Sequence[KeyReference]) -> str:
    lines = ["| key | type | default | bounds | what |", "|---|---|---|---|---|"]
    for key in keys:
        name = key.path.rpartition(".")[2]
        cells = (f"`{name}`", key.type, f"`{key.default!r}`", key.bounds, key.doc)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
