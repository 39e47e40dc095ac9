"""A few digits that tell whether results and embeddings came from the same model."""

from __future__ import annotations

import hashlib
import json

import jax
import numpy as np
from etils import epath

from tclip_jax.artifacts.files import check_size
from tclip_jax.artifacts.manifest import MANIFEST, MAX_MANIFEST_BYTES, parse_manifest
from tclip_jax.artifacts.model import Model


def fingerprint(model: Model, path: epath.PathLike) -> str:
    """32 hexadecimal digits that change with anything that changes embeddings: parameters, rules, preprocessing.

    Those of an artifact follow from its checksums, and are the same on every device and for every way of packing.

    Args:
      path: where the model was loaded from.
    """
    manifest = epath.Path(path) / MANIFEST
    if manifest.exists():
        check_size(manifest, MAX_MANIFEST_BYTES)
        fields = parse_manifest(manifest.read_bytes())
        contents = [fields[key] for key in ("model_cfg", "preprocess_cfg", "tensors")]
        return hashlib.blake2b(json.dumps(contents, sort_keys=True).encode(), digest_size=16).hexdigest()
    digest = hashlib.blake2b(f"{model!r} {jax.tree.structure(model.params)}".encode(), digest_size=16)
    for leaf in jax.tree.leaves(model.params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
