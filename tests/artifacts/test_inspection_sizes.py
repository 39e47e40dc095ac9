from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tclip_jax.artifacts import inspection as sizes
from tclip_jax.artifacts.pack import flatten
from tclip_jax.ternary import TernaryTensor

Tree = dict[str, Any]


def _tree(trits: list[int], embedding: list[int], floats: int) -> Tree:
    def ternary(values: list[int]) -> TernaryTensor:
        return TernaryTensor(np.array(values, np.int8)[:, None], np.ones((1, 1), np.float32), len(values))

    table = {"token_embedding": {"embedding": ternary(embedding)}}
    return {"kernel": ternary(trits), "bias": np.zeros(floats, np.float32), "text": table}


_TRITS = st.lists(st.integers(-1, 1), min_size=1, max_size=30)


@given(_TRITS, _TRITS, st.integers(0, 30))
def test_shares_count_parameters_and_zeros(trits: list[int], embedding: list[int], floats: int) -> None:
    tree = _tree(trits, embedding, floats)
    both = trits + embedding
    assert sizes.ternary_share(tree) == len(both) / (len(both) + floats)
    assert sizes.ternary_share(tree, token_embedding=False) == len(trits) / (len(trits) + floats)
    assert sizes.zero_share(tree) == both.count(0) / len(both)
    assert sizes.zero_share(tree, token_embedding=False) == trits.count(0) / len(trits)
    assert sizes.float32_bytes(tree) == 4 * (len(both) + floats)


def test_a_tree_without_trits_has_no_shares() -> None:
    assert sizes.ternary_share({"bias": np.zeros(3)}) == sizes.zero_share({"bias": np.zeros(3)}) == 0


@pytest.mark.parametrize(
    ("share", "compression"), [(0, 1), (0.99, 16.98), (0.5466, 2.08), (0.98904, 16.72), (1, 20.25)]
)
def test_theoretical_compression_is_that_of_the_paper(share: float, compression: float) -> None:
    assert round(sizes.theoretical_compression(share), 2) == compression


@given(st.floats(0, 1), st.floats(0, 1))
def test_theoretical_compression_grows_with_the_share(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 1 <= sizes.theoretical_compression(low) <= sizes.theoretical_compression(high) <= 32 / 1.58 + 1e-12


def test_real_compression_counts_the_weight_files_alone(written: pathlib.Path, packed: Tree) -> None:
    weights = (written / "ternary.safetensors").stat().st_size + (written / "rest.safetensors").stat().st_size
    parameters = sum(int(np.prod(leaf.shape)) for leaf in flatten(packed).values())
    assert sizes.weight_bytes(written) == weights
    assert sizes.compression_real(packed, written) == 4 * parameters / weights
    assert sizes.folder_bytes(written) == sum(path.stat().st_size for path in written.iterdir()) > weights
