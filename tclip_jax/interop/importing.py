"""Convert checkpoints of other libraries to artifacts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from etils import epath
from flax.traverse_util import unflatten_dict

from tclip_jax.artifacts.files import sha256
from tclip_jax.artifacts.format import write_artifact
from tclip_jax.artifacts.pack import flatten
from tclip_jax.data.file_tokenizer import FileTokenizer
from tclip_jax.interop.checkpoints import open_checkpoint
from tclip_jax.interop.recover import NotTernaryError, recover_parameter
from tclip_jax.interop.tokenizer_files import stated_clean
from tclip_jax.models.config import TextConfig
from tclip_jax.models.presets import model_cfg
from tclip_jax.models.ternary_rules import TERNARIZABLE
from tclip_jax.ternary import TernaryTensor


def import_checkpoint(
    source: epath.PathLike,
    out: epath.PathLike,
    *,
    like: str | None = None,
    image_size: int | None = None,
    tokenizer: Callable[[TextConfig], FileTokenizer | None] | None = None,
    ternary: bool = True,
    rest_dtype: Literal["float16", "float32"] = "float32",
    overwrite: bool = False,
) -> dict[str, TernaryTensor | NotTernaryError]:
    """Convert a checkpoint to an artifact, atomically, with one float parameter in memory at a time.

    Args:
      source: the checkpoint, as in `open_checkpoint`.
      out: the path of the artifact, local or gs://.
      like: the expected model, as in `open_checkpoint`.
      image_size: the image size of the artifact's model, as in `open_checkpoint`.
      tokenizer: function that returns the tokenizer for a text tower; None: the tokenizer is that of the source. If
        `like` says how texts are cleaned, it replaces what the tokenizer's folder says.
      ternary: store weights that are exactly scale · trit as trits and scales.
      rest_dtype: dtype of all other parameters; float32 is lossless.
      overwrite: replace `out` if it is an artifact.

    Returns:
      For each parameter that can be ternary, its `TernaryTensor`, or the error that explains why it stays float. Empty
      if `ternary` is false.

    Raises:
      FileNotFoundError: the source or one of its files is missing.
      ValueError: `open_checkpoint` refuses the source, a weight is not finite, or a tokenizer is asked for that does
        not exist or that the model does not use.
      FileExistsError: `out` exists.
    """
    checkpoint = open_checkpoint(source, like=like, image_size=image_size)
    if tokenizer:
        text = checkpoint.config.text
        if not text.hf_tokenizer_name:
            raise ValueError(f"{source}: CLIP's own tokenizer is that of the model: it takes no other")
        found = tokenizer(text)
        if found is None:
            raise ValueError(
                f"{source}: the tokenizer for it is nowhere: no tokenizer.json or spiece.model is in its folder"
            )
        if like and "tokenizer_kwargs" in (text_cfg := model_cfg(like)["text_cfg"]):
            found = dataclasses.replace(found, clean=stated_clean(like, text_cfg))
        checkpoint = checkpoint._replace(tokenizer=found)
    leaves = flatten(checkpoint.params)
    results: dict[str, TernaryTensor | NotTernaryError] = {}
    for path in [path for path in TERNARIZABLE if ternary and path in leaves]:
        if isinstance(leaves[path], TernaryTensor):
            results[path] = leaves[path]
            continue
        try:
            leaves[path] = results[path] = recover_parameter(path, leaves[path])
        except NotTernaryError as error:
            results[path] = error
    provenance = {"source": str(source), "source_sha256": {file.name: sha256(file) for file in checkpoint.files}}
    try:
        write_artifact(
            out,
            config=checkpoint.config,
            preprocess=checkpoint.preprocess,
            params=unflatten_dict(leaves, sep="/"),
            tokenizer=checkpoint.tokenizer,
            rules=(),
            rest_dtype=rest_dtype,
            provenance=provenance,
            overwrite=overwrite,
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return results
