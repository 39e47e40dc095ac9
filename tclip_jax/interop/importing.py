"""Convert checkpoints of other libraries to artifacts."""

from __future__ import annotations

from typing import Literal

from etils import epath
from flax.traverse_util import unflatten_dict

from tclip_jax.artifacts.files import sha256
from tclip_jax.artifacts.format import write_artifact
from tclip_jax.artifacts.pack import flatten
from tclip_jax.interop.checkpoints import open_checkpoint
from tclip_jax.interop.recover import NotTernaryError, recover_parameter
from tclip_jax.models.ternary_rules import TERNARIZABLE
from tclip_jax.ternary import TernaryTensor


def import_checkpoint(
    source: epath.PathLike,
    out: epath.PathLike,
    *,
    like: str | None = None,
    image_size: int | None = None,
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
      ternary: store weights that are exactly scale · trit as trits and scales.
      rest_dtype: dtype of all other parameters; float32 is lossless.
      overwrite: replace `out` if it is an artifact.

    Returns:
      For each parameter that can be ternary, its `TernaryTensor`, or the error that explains why it stays float. Empty
      if `ternary` is false.

    Raises:
      FileNotFoundError: the source or one of its files is missing.
      ValueError: `open_checkpoint` refuses the source, or a weight is not finite.
      FileExistsError: `out` exists.
    """
    checkpoint = open_checkpoint(source, like=like, image_size=image_size)
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
            rules=(),
            rest_dtype=rest_dtype,
            provenance=provenance,
            overwrite=overwrite,
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return results
