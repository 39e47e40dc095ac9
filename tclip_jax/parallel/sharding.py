"""Parameter sharding: one table from parameter path to PartitionSpec."""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from tclip_jax.parallel.mesh import mesh_in_force

P = PartitionSpec

# The first rule that matches the end of a path applies; optimizer moments have longer paths that end alike.
# FSDP shards the output axis, so that no shard splits a group of weights that share a scale.
# `tensor` follows Megatron-LM (arXiv 1909.08053): the first matrix of a pair is split along its outputs, the second
# along its inputs, where shards are whole groups. It precedes `fsdp`, so that an all-gather over `fsdp` yields the
# shard that a device multiplies. qkv is gathered whole, since the columns of a head's q, k and v are not adjacent.
_OUTPUT = ("tensor", "fsdp")
RULES: tuple[tuple[str, PartitionSpec, PartitionSpec], ...] = (
    # path, spec of the stored parameter, spec for its matrix product
    (r"blocks/attention/qkv/kernel(_scale|/int8)?", P(None, None, _OUTPUT), P()),
    (r"blocks/mlp/fc1/kernel(_scale|/int8)?", P(None, None, _OUTPUT), P(None, None, "tensor")),
    (r"blocks/(attention/out|mlp/fc2)/kernel(_scale|/int8)?", P(None, "tensor", "fsdp"), P(None, "tensor", None)),
    (r"pool/attention/(q|kv)/kernel(_scale)?", P(None, _OUTPUT), P()),
    (r"pool/mlp/fc1/kernel(_scale)?", P(None, _OUTPUT), P(None, "tensor")),
    (r"pool/(attention/out|mlp/fc2)/kernel(_scale)?", P("tensor", "fsdp"), P("tensor", None)),
    (r"patch_embedding/kernel", P(None, None, None, _OUTPUT), P()),
    (r"token_embedding/embedding(_scale)?", P(_OUTPUT, None), P()),
    (r"(projection/kernel(_scale)?|patch_embedding/kernel_scale)", P(None, _OUTPUT), P()),
    (r"heads/(hidden/)?(image|text)/kernel", P(None, _OUTPUT), P()),
    (r".*", P(), P()),
)


def path_of(key_path: tuple[Any, ...]) -> str:
    """Return a key path of jax.tree_util as a string: 'image/blocks/mlp/fc1/kernel'."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Return the spec of a stored parameter: the first matching rule of `RULES`, without mesh axes of size 1.

    If an array axis is not divisible by all of its mesh axes, it is sharded over the last of them that divide it.
    """
    return _fitting(_rule(path)[0], shape, mesh)


def matrix_specs(path: str, shape: tuple[int, ...]) -> tuple[PartitionSpec, PartitionSpec] | None:
    """Return how a matrix (K, N), one layer of a stacked parameter, is sharded over the mesh of `jax.set_mesh`.

    Returns:
      The specs for storage and for the matrix product; None without a mesh, or if the matrix is replicated.
    """
    mesh = mesh_in_force()
    if mesh is None:
        return None
    stored, used = (_fitting(P(*[None, None, *spec][-2:]), shape, mesh) for spec in _rule(path))
    return None if stored == used == P(None, None) else (stored, used)


def _rule(path: str) -> tuple[PartitionSpec, PartitionSpec]:
    return next((stored, used) for pattern, stored, used in RULES if re.search(rf"(?:^|/){pattern}$", path))


def _fitting(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    return P(*(_dividing(names, size, mesh) for names, size in zip(spec, shape, strict=False)))


def _dividing(
    names: str | tuple[str, ...] | None, size: int, mesh: Mesh | AbstractMesh
) -> str | tuple[str, ...] | None:
    dividing: tuple[str, ...] = ()
    for name in reversed((names,) if isinstance(names, str) else names or ()):
        if mesh.shape[name] > 1 and size % mesh.shape[name] == 0:
            dividing, size = (name, *dividing), size // mesh.shape[name]
    return dividing if len(dividing) > 1 else dividing[0] if dividing else None


def tree_shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Return the NamedSharding of every leaf of a tree of arrays or shapes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path_of(path), leaf.shape, mesh)), tree
    )
