from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tclip_jax.artifacts.safetensors import LazyArray, LazyStack
from tclip_jax.interop.recover import NotTernaryError, recover_ternary, scale_bits
from tclip_jax.ternary import Quantizer, TernaryTensor, ternarize

_ternarize = jax.jit(ternarize, static_argnums=(1, 2))


def expanded(t: TernaryTensor) -> npt.NDArray[np.float64]:
    """Return scale · trit, computed with NumPy's repeat."""
    scale = np.asarray(t.scale, np.float64)
    if scale.shape[t.axis] > 1:
        scale = np.repeat(scale, t.group, t.axis).take(range(t.shape[t.axis]), t.axis)
    return np.asarray(t.trits, np.float64) * scale


def assert_same(recovered: TernaryTensor, expected: TernaryTensor) -> None:
    assert (recovered.group, recovered.axis) == (expected.group, expected.axis)
    np.testing.assert_array_equal(recovered.trits, expected.trits)
    assert np.asarray(recovered.scale).tobytes() == np.asarray(expected.scale).tobytes()
    assert recovered.trits.dtype == np.int8 and recovered.scale.shape == expected.scale.shape


@pytest.mark.parametrize(
    ("group", "axis", "dtype"),
    [
        ("tensor", -2, "float16"),
        ("tensor", -1, "float32"),
        ("channel", -2, "float32"),
        ("channel", -1, "bfloat16"),
        (32, -2, "bfloat16"),
        (64, -1, "float32"),
        (256, -2, "float16"),
        (256, -1, "bfloat16"),
    ],
)
def test_what_a_quantizer_made_is_recovered_with_its_groups(group: int | str, axis: int, dtype: str) -> None:
    bits = {"float32": 24, "float16": 11, "bfloat16": 8}[dtype]
    w = np.random.default_rng(0).normal(0, 0.02, (2, 300, 600)).astype(np.float32)
    t = jax.device_get(_ternarize(jnp.asarray(w), Quantizer(2.0, group, bits), axis))  # type: ignore[arg-type]
    stored = expanded(t).astype(jnp.dtype(dtype))
    recovered = recover_ternary(stored, axis)
    assert_same(recovered, t)
    assert scale_bits(recovered.scale) <= bits
    np.testing.assert_array_equal(expanded(recovered), stored.astype(np.float64))


@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 5), st.sampled_from([-1, -2]))
@settings(max_examples=40, deadline=None)
def test_any_ternary_weights_give_themselves_back(seed: int, length: int, outputs: int, axis: int) -> None:
    rng = np.random.default_rng(seed)
    groups = -(-length // 32)
    scale = rng.random((outputs, groups), np.float32) * 2.0 ** rng.integers(-30, 30)
    trits = rng.integers(-1, 2, (outputs, length)) * rng.integers(0, 2, (outputs, 1))
    w = (trits * np.repeat(scale, 32, 1)[:, :length]).astype(np.float32)
    w = w if axis == -1 else w.T
    np.testing.assert_array_equal(expanded(recover_ternary(w, axis)), w.astype(np.float64))


def test_layers_of_different_groups_share_the_finest() -> None:
    trits = np.random.default_rng(1).integers(-1, 2, (3, 512, 4), np.int8)
    scales = [np.full((512, 4), 0.5), np.arange(1, 5) * np.ones((512, 1)), np.repeat([[1.0], [2.0]], 256, 0)]
    w = (trits * np.stack([np.broadcast_to(scale, (512, 4)) for scale in scales])).astype(np.float32)
    recovered = recover_ternary(w)
    assert recovered.group == 256 and recovered.scale.shape == (3, 2, 4)
    np.testing.assert_array_equal(expanded(recovered), w)
    assert recover_ternary(w[:2]).scale.shape == (2, 1, 4)
    assert recover_ternary(w[:1]).scale.shape == (1, 1, 1)


def test_zeros_have_scale_zero_and_lose_their_sign() -> None:
    w = np.zeros((512, 3), np.float32)
    w[300, 1], w[5, 2] = -2.0, -0.0
    recovered = recover_ternary(w)
    np.testing.assert_array_equal(recovered.scale, [[2.0]])
    assert not np.signbit(recovered.dequantize()[5, 2])
    assert recover_ternary(np.zeros((64, 3), np.float32)).scale.tolist() == [[0.0]]


def test_the_first_group_that_does_not_fit_is_named() -> None:
    rng = np.random.default_rng(2)
    w = (rng.integers(-1, 2, (3, 512, 100)) * rng.random((3, 1, 100))).astype(np.float32)
    w[1, 70, 90] = 7.0
    with pytest.raises(NotTernaryError, match=r"^layer 1, inputs 64–95 of output 90 have 2 magnitudes \(0\.\d+, 7\)"):
        recover_ternary(w)
    w[1, 70, 90] = np.nan
    with pytest.raises(NotTernaryError, match=r"^layer 1, inputs 64–95 of output 90 .* fit in 99\.9%"):
        recover_ternary(w)


def test_infinity_is_no_scale() -> None:
    with pytest.raises(NotTernaryError, match=r"of output 0 have 1 magnitudes \(inf\)"):
        recover_ternary(np.full((32, 2), np.inf, np.float32))


def test_float_weights_are_refused_after_one_layer() -> None:
    read: list[int] = []

    def layer(i: int) -> LazyArray:
        def load() -> npt.NDArray[np.float32]:
            read.append(i)
            return np.random.default_rng(i).random((64, 8), np.float32)

        return LazyArray((64, 8), np.dtype(np.float32), load)

    with pytest.raises(
        NotTernaryError, match=r"^layer 0, inputs 0–\d+ of output 0 have \d+ magnitudes .*, …\).* 0\.0%"
    ):
        recover_ternary(LazyStack((layer(0), layer(1))))
    assert read == [0]


@pytest.mark.parametrize(("value", "bits"), [(1.0, 1), (1.5, 2), (255 / 128, 8), (1 + 2**-10, 11), (0.1, 24), (0.0, 1)])
def test_significant_bits_of_a_scale(value: float, bits: int) -> None:
    assert scale_bits(np.float32([1, value])) == bits
