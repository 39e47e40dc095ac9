"""The packed format on disk: a folder of trits, scales, configuration, tokenizer and preprocessing."""

from tclip_jax.artifacts.format import Artifact, read_artifact, write_artifact
from tclip_jax.artifacts.manifest import ArtifactError
from tclip_jax.artifacts.pack import pack_params
from tclip_jax.artifacts.verify import verify_artifact

__all__ = ["Artifact", "ArtifactError", "pack_params", "read_artifact", "verify_artifact", "write_artifact"]
