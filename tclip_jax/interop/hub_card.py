"""The model card of a push: the README.md of an export, with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import huggingface_hub

from tclip_jax.interop.privacy import shortened

CARD = "README.md"
_TASK = "zero-shot-image-classification"
# A file -> the library that loads it, the first that there is.
_LIBRARIES = {
    "open_clip_model.safetensors": "open_clip",
    "model.safetensors": "transformers",
    "tclip.json": "tclip_jax",
}
_PROVENANCE = re.compile(r"(?<=^\| provenance \| \|\n\|---\|---\|\n)(?:\|.*\n?)+", re.MULTILINE)


def public_provenance(text: str) -> tuple[str, list[str]]:
    """Shorten private paths in the table of provenance of README.md to their last names, which are those of the data.

    Returns:
      The text with as many lines, and a note for each value that was shortened.
    """
    notes: list[str] = []

    def row(line: str) -> str:
        short = shortened(line)
        if short != line:
            name, value = (cell.strip() for cell in short.strip("|").split("|", 1))
            notes.append(f"{CARD}: {name} is shortened to {value}")
        return short

    return _PROVENANCE.sub(lambda table: "\n".join(map(row, table[0].split("\n"))), text), notes


def hub_card(text: str, files: Collection[str], repository: str, licence: str = "") -> str:
    """Return README.md as the model card of a repository.

    The front matter gets the licence, and the task, library and tags where it has none. In the text, the repository
    takes the place of FOLDER. Nothing else is changed: figures are those of the export.

    Args:
      text: README.md.
      files: the files that are pushed.
      repository: USER/NAME.
      licence: the licence as the hub names it; "" for that of the front matter.

    Raises:
      ValueError: the front matter is not YAML, or the licence is missing, wrong, or contradicts the front matter.
    """
    try:
        card = huggingface_hub.ModelCard(text if text.startswith("---") else f"---\n{{}}\n---\n{text}")
    # PyYAML and huggingface_hub raise many kinds of errors, with many lines.
    except Exception as error:
        raise ValueError(
            f"{CARD}: its front matter is not what the hub reads: {' '.join(str(error).split())}"
        ) from None
    data: Any = card.data
    data.license = _licence(licence, data.license, data.get("license_name"))
    data.pipeline_tag = data.pipeline_tag or _TASK
    data.library_name = data.library_name or next((_LIBRARIES[name] for name in _LIBRARIES if name in files), None)
    data.tags = list(dict.fromkeys([*(data.tags or []), "clip"]))
    card.text = card.text.replace("local-dir:FOLDER", f"hf-hub:{repository}").replace('"FOLDER"', f'"{repository}"')
    return str(card)


def _licence(given: str, stated: Any, name: Any) -> str:
    if given and stated and given != stated:
        raise ValueError(f"{CARD} states the licence {stated}, and --licence is {given}: make them the same")
    licence = given or stated
    if not licence:
        raise ValueError("no licence: pass --licence ID, such as apache-2.0, mit, cc-by-4.0 or cc-by-nc-4.0")
    if not isinstance(licence, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise ValueError(f"licence {licence!r} is not an ID of the hub, such as apache-2.0, mit or cc-by-4.0")
    if licence == "other" and not name:
        raise ValueError(f"licence other needs license_name and license_link in the front matter of {CARD}")
    return licence
