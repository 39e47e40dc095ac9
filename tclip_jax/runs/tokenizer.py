"""The tokenizer of a run whose texts CLIP's own does not tokenize: <workdir>/tokenizer, so that it restarts anywhere.

tokenizer/options.json     how the file is read, and its sha256
tokenizer/tokenizer.json   or spiece.model
"""

from __future__ import annotations

import hashlib
import json

from etils import epath

from tclip_jax.artifacts.files import MAX_OTHER_BYTES, check_size
from tclip_jax.data.file_tokenizer import FileTokenizer
from tclip_jax.models.config import TextConfig
from tclip_jax.storage import atomic_folder

_FOLDER, _OPTIONS = "tokenizer", "options.json"


def keep_tokenizer(workdir: epath.PathLike, tokenizer: FileTokenizer) -> None:
    """Write the tokenizer of a run, atomically, if the run has none yet."""
    folder = epath.Path(workdir) / _FOLDER
    if folder.exists():
        return
    options = {"sha256": hashlib.sha256(tokenizer.data).hexdigest(), "tokenizer": tokenizer.options}
    with atomic_folder(folder) as building:
        (building / tokenizer.file).write_bytes(tokenizer.data)
        (building / _OPTIONS).write_text(json.dumps(options, indent=2) + "\n")


def kept_tokenizer(workdir: epath.PathLike, text: TextConfig) -> FileTokenizer | None:
    """Return the tokenizer that a run keeps; None if it has none, or the model has CLIP's own.

    Raises:
      ValueError: a file is missing, too large or damaged.
    """
    folder = epath.Path(workdir) / _FOLDER
    if not text.hf_tokenizer_name or not folder.exists():
        return None

    def read(name: str) -> bytes:
        check_size(folder / name, MAX_OTHER_BYTES)
        return (folder / name).read_bytes()

    path = folder / _OPTIONS
    try:
        stored = json.loads(read(_OPTIONS))
        tokenizer = FileTokenizer.from_options(
            stored["tokenizer"],
            read,
            name=text.hf_tokenizer_name,
            context_length=text.context_length,
            vocab_size=text.vocab_size,
        )
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} does not describe a tokenizer: {error}") from None
    if hashlib.sha256(tokenizer.data).hexdigest() != stored.get("sha256"):
        raise ValueError(f"{folder / tokenizer.file} is damaged: its bytes do not have the sha256 in {_OPTIONS}")
    return tokenizer
