"""One table from parameter path to PartitionSpec."""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from tclip_jax.parallel.mesh import mesh_in_force

P = PartitionSpec

# First match wins. FSDP shards the output axis, so that no shard cuts through a group of weights that share a scale.
# `tensor` is Megatron's (arXiv 1909.08053): the first product of a pair is split by outputs, the second by inputs, and
# there shards must be whole groups. It comes before `fsdp`, so that gathering over `fsdp` gives a device what it needs.
# A device needs the same heads of q, k and v, which are not beside each other: all of qkv is gathered.
# A path may have more before it (the optimizer's moments carry the parameters' paths).
_OUTPUT = ("tensor", "fsdp")
RULES: tuple[tuple[str, PartitionSpec, PartitionSpec], ...] = (
    # path, where it is stored, where a product uses it
    (r"blocks/attention/qkv/kernel(_scale)?", P(None, None, _OUTPUT), P()),
    (r"blocks/mlp/fc1/kernel(_scale)?", P(None, None, _OUTPUT), P(None, None, "tensor")),
    (r"blocks/(attention/out|mlp/fc2)/kernel(_scale)?", P(None, "tensor", "fsdp"), P(None, "tensor", None)),
    (r"patch_embedding/kernel", P(None, None, None, _OUTPUT), P()),
    (r"token_embedding/embedding(_scale)?", P(_OUTPUT, None), P()),
    (r"(projection/kernel(_scale)?|patch_embedding/kernel_scale)", P(None, _OUTPUT), P()),
    (r"heads/(hidden/)?(image|text)/kernel", P(None, _OUTPUT), P()),
    (r".*", P(), P()),
)


def path_of(key_path: tuple[Any, ...]) -> str:
    """'image/blocks/mlp/fc1/kernel' from the key path of jax.tree_util."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The first matching rule of the table, without mesh axes of size 1.

    An axis that its mesh axes do not divide is sharded over the last of them that do, or not at all.
    """
    return _fitting(_rule(path)[0], shape, mesh)


def matrix_specs(path: str, shape: tuple[int, ...]) -> tuple[PartitionSpec, PartitionSpec] | None:
    """How the matrix (K, N) of a parameter, one layer of stacked ones, is sharded over the mesh in force.

    Returns:
      Where it is stored and where a product uses it; None without a mesh, or where each device has all of it.
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
