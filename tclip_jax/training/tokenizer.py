"""The tokenizer of a run: CLIP's own, or that of the model from which the run starts."""

from __future__ import annotations

import logging

from etils import epath

from tclip_jax.data.file_tokenizer import FileTokenizer
from tclip_jax.data.tokenizer import TextTokenizer, tokenizer_of
from tclip_jax.inference.load import load_tokenizer
from tclip_jax.models.config import TextConfig
from tclip_jax.runs.config import RunConfig
from tclip_jax.runs.record import last_record
from tclip_jax.runs.tokenizer import kept_tokenizer

_logger = logging.getLogger(__name__)


def run_tokenizer(run: RunConfig, workdir: epath.PathLike | None = None, *, teacher: str = "") -> TextTokenizer:
    """Return the tokenizer of a run's texts.

    If it is not CLIP's own, it is the one that the workdir keeps. In a new run it is the first that
    `config.data.tokenizer`, `init`, `inherit` or `teacher` has.

    Args:
      run: the configuration.
      workdir: workdir of the run; None: not that of a run.
      teacher: the teacher, in place of the configuration's.

    Raises:
      FileNotFoundError: one of these does not exist.
      ValueError: none of them has a tokenizer, it does not fit the model, or the run has used another one.
    """
    text = run.model.text
    if not text.hf_tokenizer_name:
        return tokenizer_of(text.context_length, "")
    found = kept_tokenizer(workdir, text) if workdir else None
    named = run.data.tokenizer
    if found and named and not epath.Path(named).exists():
        _logger.info("config.data.tokenizer %s is not here: the run's own tokenizer is used", named)
    elif found and named:
        _check_same(f"config.data.tokenizer {named}", load_tokenizer(named, text), found, f"{workdir}/tokenizer")
    for source in filter(None, (named, run.init, run.inherit, teacher or run.teacher)):
        found = found or load_tokenizer(source, text)
    if found is None:
        raise ValueError(
            f"the model's texts are tokenized by {text.hf_tokenizer_name!r:.80}, which none of init, inherit and"
            " teacher has: set config.data.tokenizer to a folder with its tokenizer.json or spiece.model, and"
            " tokenizer_config.json, or to an artifact or run"
        )
    found.check()
    recorded = (last_record(workdir).get("data") or {}).get("tokenizer") if workdir else None
    if recorded not in (None, found.digest):
        raise ValueError(
            f"{workdir}: this run has used another tokenizer: choose another workdir, or give back the old one"
        )
    return found


def check_teacher_tokenizer(source: str, text: TextConfig, stored: FileTokenizer | None, ours: TextTokenizer) -> None:
    """Raise ValueError if a teacher, which gets the run's tokens, has another tokenizer.

    Args:
      source: name of the teacher, for the error.
      text: the teacher's text tower.
      stored: the tokenizer that is stored with the teacher.
      ours: the run's.
    """
    if bool(text.hf_tokenizer_name) != isinstance(ours, FileTokenizer):
        raise ValueError(f"the teacher {source} has another tokenizer than the model: they read the same tokens")
    if isinstance(ours, FileTokenizer) and stored:
        _check_same(f"the teacher {source}", stored, ours, "the model")


def _check_same(name: str, tokenizer: FileTokenizer | None, ours: FileTokenizer, our_name: str) -> None:
    if tokenizer is None or tokenizer.digest != ours.digest:
        options = "" if tokenizer is None else f" ({tokenizer.options}, and {our_name}: {ours.options})"
        raise ValueError(f"{name} has another tokenizer than {our_name}{options}: they must be equal")
