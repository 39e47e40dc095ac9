"""Other people's checkpoints to artifacts."""

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
    """Writes the model of a checkpoint as an artifact, whole or not at all, one float parameter in memory at a time.

    Args:
      source: as of `open_checkpoint`, with `like` and `image_size`.
      out: the artifact, local or gs://.
      ternary: whether to look for weights that are scale · trit, and to store them as such.
      rest_dtype: of all other parameters; float32 loses nothing.
      overwrite: whether an artifact that is there may be replaced.

    Returns:
      What became of each parameter that could be ternary: recovered, or why it stays float; empty if not looked for.

    Raises:
      FileNotFoundError, ValueError: as of `open_checkpoint`, and for weights that are not finite.
      FileExistsError: `out` exists.
    """
    checkpoint = open_checkpoint(source, like=like, image_size=image_size)
    leaves = flatten(checkpoint.params)
    found: dict[str, TernaryTensor | NotTernaryError] = {}
    for path in TERNARIZABLE if ternary else ():
        if isinstance(leaves[path], TernaryTensor):
            found[path] = leaves[path]
            continue
        try:
            leaves[path] = found[path] = recover_parameter(path, leaves[path])
        except NotTernaryError as error:
            found[path] = error
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
    return found
