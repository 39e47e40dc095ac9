"""Integers of 4 and 8 bits on disk: exact, near their entropy, and refused if they are not what they claim."""

from __future__ import annotations

import tracemalloc
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tclip_jax.artifacts.coding import decode, encode, largest_stored_bytes
from tclip_jax.artifacts.manifest import ArtifactError
from tclip_jax.artifacts.pack import compiled_quantize
from tclip_jax.ternary import Quantizer, UniformTensor
from tclip_jax.ternary.uniform import pack_uniform

every_width = pytest.mark.parametrize("bits", [4, 8])


def tensor(bits: int, shape: tuple[int, ...] = (2, 31, 7), group: int = 8, seed: int = 0) -> UniformTensor:
    rng, largest = np.random.default_rng(seed), 2 ** (bits - 1) - 1
    integers = rng.integers(-largest, largest + 1, shape).astype(np.int8)
    scale: Any = rng.exponential(size=(*shape[:-2], -(-shape[-2] // group), shape[-1])).astype(np.float32)
    return pack_uniform(integers, scale, bits, group, -2)


def forged(bits: int, data: bytes, level: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    """Another frame in place of the integers of (2, 31, 7)."""
    entry, stored = encode("w", tensor(bits), "float16")
    frame = zstandard.ZstdCompressor(level=level).compress(data)
    return entry, stored | {"w.integers": np.frombuffer(frame, np.uint8)}


@every_width
@given(st.integers(0, 3), st.integers(1, 12), st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_it_comes_back_to_the_bit(bits: int, layers: int, length: int, width: int, group: int, seed: int) -> None:
    whole = tensor(bits, (layers, length, width), min(group, length), seed)
    entry, stored = encode("w", whole, "float16")
    found = decode("w", entry, stored)
    assert (found.bits, found.length, found.group, found.axis) == (bits, length, whole.group, -2)
    np.testing.assert_array_equal(found.data, whole.data)
    np.testing.assert_array_equal(found.scale, whole.scale)
    assert entry["coding"] == f"int{bits}+zstd"
    assert sum(array.nbytes for array in stored.values()) <= largest_stored_bytes(entry)


@every_width
def test_a_scale_whose_largest_multiple_overflows_is_refused(bits: int) -> None:
    largest: Any = np.finfo(np.float32).max / np.float32(2 ** (bits - 1) - 1)
    fits, beyond = np.float32(largest * (1 - 1e-6)), np.float32(largest * (1 + 1e-6))
    whole = tensor(bits)

    def with_scale(scale: Any) -> UniformTensor:
        return pack_uniform(whole.integers, np.full_like(whole.scale, scale), bits, whole.group, -2)

    entry, stored = encode("w", with_scale(fits), "float16")
    assert np.isfinite(decode("w", entry, stored).dequantize()).all()
    message = rf"^w\.scale has [\d.e+]+: times the integer {2 ** (bits - 1) - 1} it must be finite, so at most"
    with pytest.raises(ArtifactError, match=message):
        encode("w", with_scale(beyond), "float16")
    planes = np.full(whole.scale.shape, beyond).view(np.uint8).reshape(-1, 4).T.tobytes()
    forged_scale = {"w.scale": np.frombuffer(zstandard.compress(planes), np.uint8)}
    with pytest.raises(ArtifactError, match=message):
        decode("w", entry, stored | forged_scale)


@pytest.mark.parametrize(("bits", "expected"), [(4, 3.31), (8, 7.47)])
def test_gaussian_weights_take_about_their_entropy(bits: Any, expected: float) -> None:
    w = jnp.asarray(np.random.default_rng(0).standard_normal((768, 1024)).astype(np.float32))
    made = compiled_quantize(w, Quantizer(kind="uniform", bits=bits))
    _, shares = np.unique(made.integers, return_counts=True)
    entropy = -(shares / w.size * np.log2(shares / w.size)).sum()
    stored = encode("w", made, "float16")[1]
    size, scales = (8 * stored[f"w.{part}"].size / w.size for part in ("integers", "scale"))
    assert entropy < size < entropy * 1.01
    assert (size, scales) == (pytest.approx(expected, abs=0.01), pytest.approx(0.03, abs=0.005))


@every_width
@pytest.mark.parametrize("excess", [-1, 1])
def test_another_number_of_bytes_is_refused(bits: int, excess: int) -> None:
    size = 2 * 31 * 7 * bits // 8
    with pytest.raises(
        ArtifactError, match=rf"^w\.integers expands to {size + excess} bytes: the frame must decl.* {size}"
    ):
        decode("w", *forged(bits, bytes(size + excess)))


@every_width
def test_bombs_are_refused_without_being_expanded(bits: int) -> None:
    entry, stored = forged(bits, bytes(2**28), level=1)
    tracemalloc.start()
    with pytest.raises(ArtifactError, match=r"^w\.integers expands to 268435456 bytes"):
        decode("w", entry, stored)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(("bits", "byte"), [(4, 0x08), (4, 0x80), (8, 0x80)])
def test_the_lowest_integer_of_twos_complement_is_refused(bits: int, byte: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    message = rf"^w\.integers: integers of {bits} bits are −{high} to {high}: found {low} to 0$"
    with pytest.raises(ArtifactError, match=message):
        decode("w", *forged(bits, bytes([byte]) + bytes(2 * 31 * 7 * bits // 8 - 1)))
    wrong = pack_uniform(np.full((31, 7), low, np.int8), np.ones((1, 7), np.float32), bits, 31, -2)
    with pytest.raises(ArtifactError, match=rf"^w\.integers: integers of {bits} bits .* found {low} to {low}$"):
        encode("w", wrong, "float16")


@every_width
def test_other_integers_than_the_checksum_are_refused(bits: int) -> None:
    with pytest.raises(ArtifactError, match=r"^w is damaged: its decoded values do not have the sha256"):
        decode("w", *forged(bits, bytes(2 * 31 * 7 * bits // 8)))
