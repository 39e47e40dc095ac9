"""One table from parameter path to PartitionSpec."""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

P = PartitionSpec

# First match wins. FSDP shards the output axis, so that no shard cuts through a group of weights that share a scale.
# A path may have more before it (the optimizer's moments carry the parameters' paths).
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"blocks/(attention/(qkv|out)|mlp/(fc1|fc2))/kernel(_scale)?", P(None, None, "fsdp")),
    (r"patch_embedding/kernel", P(None, None, None, "fsdp")),
    (r"token_embedding/embedding(_scale)?", P("fsdp", None)),
    (r"(projection/kernel(_scale)?|patch_embedding/kernel_scale|heads/(hidden/)?(image|text)/kernel)", P(None, "fsdp")),
    (r".*", P()),
)


def path_of(key_path: tuple[Any, ...]) -> str:
    """'image/blocks/mlp/fc1/kernel' from the key path of jax.tree_util."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The first matching rule of the table; an axis that its mesh axis does not divide is not sharded."""
    spec = next(spec for pattern, spec in RULES if re.search(rf"(?:^|/){pattern}$", path))
    return P(
        *(
            name if name is not None and size % mesh.shape[name] == 0 else None
            for name, size in zip(spec, shape, strict=False)
        )
    )


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """The NamedSharding of every leaf of a tree of arrays or shapes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path_of(path), leaf.shape, mesh)), tree
    )
