"""One table from parameter path to PartitionSpec."""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

P = PartitionSpec

# First match wins. FSDP shards the output axis, so that no shard cuts through a group of weights that share a scale.
# `tensor` is Megatron's (arXiv 1909.08053): the first product of a pair is split by outputs, the second by inputs, and
# there shards must be whole groups. It comes before `fsdp`, so that gathering over `fsdp` gives a device what it needs.
# A path may have more before it (the optimizer's moments carry the parameters' paths).
_OUTPUT = ("tensor", "fsdp")
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"blocks/(attention/qkv|mlp/fc1)/kernel(_scale)?", P(None, None, _OUTPUT)),
    (r"blocks/(attention/out|mlp/fc2)/kernel(_scale)?", P(None, "tensor", "fsdp")),
    (r"patch_embedding/kernel", P(None, None, None, _OUTPUT)),
    (r"token_embedding/embedding(_scale)?", P(_OUTPUT, None)),
    (
        r"(projection/kernel(_scale)?|patch_embedding/kernel_scale|heads/(hidden/)?(image|text)/kernel)",
        P(None, _OUTPUT),
    ),
    (r".*", P()),
)


def path_of(key_path: tuple[Any, ...]) -> str:
    """'image/blocks/mlp/fc1/kernel' from the key path of jax.tree_util."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The first matching rule of the table, without mesh axes of size 1.

    An axis that its mesh axes do not divide is sharded over the last of them that do, or not at all.
    """
    spec = next(spec for pattern, spec in RULES if re.search(rf"(?:^|/){pattern}$", path))
    return P(*(_dividing(names, size, mesh) for names, size in zip(spec, shape, strict=False)))


def _dividing(
    names: str | tuple[str, ...] | None, size: int, mesh: Mesh | AbstractMesh
) -> str | tuple[str, ...] | None:
    kept: tuple[str, ...] = ()
    for name in reversed((names,) if isinstance(names, str) else names or ()):
        if mesh.shape[name] > 1 and size % mesh.shape[name] == 0:
            kept, size = (name, *kept), size // mesh.shape[name]
    return kept if len(kept) > 1 else kept[0] if kept else None


def tree_shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The NamedSharding of every leaf of a tree of arrays or shapes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path_of(path), leaf.shape, mesh)), tree
    )
