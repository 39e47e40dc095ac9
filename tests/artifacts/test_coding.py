from __future__ import annotations

import hashlib
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
from tclip_jax.ternary import TernaryTensor

SHAPE = (2, 30, 7)


def _tensor(zeros: float = 0.575, shape: tuple[int, ...] = SHAPE, group: int = 8) -> TernaryTensor:
    rng = np.random.default_rng(0)
    trits = rng.choice(np.array([-1, 0, 1], np.int8), shape, p=[(1 - zeros) / 2, zeros, (1 - zeros) / 2])
    scale = rng.uniform(0.01, 1, (*shape[:-2], -(-shape[-2] // group), shape[-1])).astype(np.float32)
    return TernaryTensor(trits, scale, group)


def _with_frame(frame: bytes, name: str = "w.trits") -> tuple[dict[str, Any], dict[str, Any]]:
    entry, stored = encode("w", _tensor(), "float16")
    return entry, stored | {name: np.frombuffer(frame, np.uint8)}


def _frame(value: Any) -> bytes:
    """Encode floats as documented, byte by byte."""
    data = value.tobytes()
    planes = bytes(data[i] for k in range(value.itemsize) for i in range(k, len(data), value.itemsize))
    return zstandard.ZstdCompressor(level=19).compress(planes)


@given(st.integers(0, 3), st.integers(1, 12), st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_ternary_tensors_come_back_to_the_bit(layers: int, length: int, width: int, group: int, seed: int) -> None:
    rng, group = np.random.default_rng(seed), min(group, length)
    scale = rng.exponential(size=(layers, -(-length // group), width)).astype(np.float32)
    tensor = TernaryTensor(rng.integers(-1, 2, (layers, length, width), np.int8), scale, group)
    entry, stored = encode("w", tensor, "float16")
    decoded = decode("w", entry, stored)
    np.testing.assert_array_equal(decoded.trits, tensor.trits)
    np.testing.assert_array_equal(decoded.scale, tensor.scale)
    assert (decoded.group, decoded.axis, decoded.scale.dtype) == (group, -2, np.float32)
    assert sum(array.nbytes for array in stored.values()) <= largest_stored_bytes(entry)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (2.0**-17 * 1.5, "float16"),
        (1 + 2**-10, "float16"),
        (2**-25, "float32"),
        (1 + 2**-11, "float32"),
        (1e5, "float32"),
    ],
)
def test_scales_are_float16_exactly_when_that_loses_nothing(scale: float, dtype: str) -> None:
    tensor = TernaryTensor(np.ones((4, 1), np.int8), np.full((1, 1), scale, np.float32), 4)
    entry, stored = encode("w", tensor, "float16")
    assert entry["dtype"] == dtype
    assert decode("w", entry, stored).scale == np.float32(scale)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_other_arrays_come_back_to_the_bit_after_the_cast(dtype: str, shape: tuple[int, ...]) -> None:
    value = np.asarray(np.random.default_rng(0).normal(size=shape), np.float32)
    entry, stored = encode("b", value, dtype)
    decoded = decode("b", entry, stored)
    assert entry["dtype"] == dtype
    assert decoded.shape == shape
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, value.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_floats_are_byte_planes(dtype: str) -> None:
    value = np.random.default_rng(0).normal(size=(3, 5)).astype(dtype)
    entry, stored = encode("b", value, dtype)
    assert zstandard.decompress(stored["b"].tobytes()) == zstandard.decompress(_frame(value))
    assert entry["sha256"] == hashlib.sha256(value.tobytes()).hexdigest()
    np.testing.assert_array_equal(decode("b", entry, {"b": np.frombuffer(_frame(value), np.uint8)}), value)


def test_scales_and_other_floats_become_smaller() -> None:
    latent = np.random.default_rng(0).normal(0, 0.02, (1, 768, 3072)).astype(np.float32)
    _, floats = encode("b", latent, "float16")
    assert floats["b"].size < 0.86 * 2 * latent.size
    scale = (2 * abs(latent.reshape(1, 3, 256, 3072)).mean(axis=2)).astype(jnp.bfloat16).astype(np.float32)
    _, stored = encode("w", TernaryTensor(np.sign(latent).astype(np.int8), scale, 256), "float16")
    assert stored["w.scale"].size < 0.45 * 2 * scale.size


@pytest.mark.parametrize("zeros", [0.55, 0.575, 0.6, 0.65])
def test_size_is_within_a_percent_of_the_entropy(zeros: float) -> None:
    tensor = _tensor(zeros, (1, 1000, 1000), 1000)
    counts = np.unique(tensor.trits, return_counts=True)[1] / tensor.trits.size
    entropy_bytes = -(counts * np.log2(counts)).sum() * tensor.trits.size / 8
    _, stored = encode("w", tensor, "float16")
    assert entropy_bytes < stored["w.trits"].size < entropy_bytes * 1.01


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"^b is not finite in float16: NaN, infinity, or beyond 65504$"):
        encode("b", np.float32([1, 7e4]), "float16")
    with pytest.raises(ArtifactError, match=r"^b is not finite in float32"):
        encode("b", np.float32([np.nan]), "float32")
    tensor = _tensor()
    with pytest.raises(ArtifactError, match=r"^w\.scale is negative"):
        encode("w", TernaryTensor(tensor.trits, -tensor.scale, 8), "float16")
    with pytest.raises(ArtifactError, match=r"^w\.scale is not finite"):
        encode("w", TernaryTensor(tensor.trits, tensor.scale * np.float32(np.inf), 8), "float16")
    with pytest.raises(ArtifactError, match=r"^w\.trits: trits are −1, 0 and \+1: found -2 to 2"):
        encode("w", TernaryTensor(tensor.trits * 2, tensor.scale, 8), "float16")


@pytest.mark.parametrize(("name", "size"), [("w.trits", 84), ("w.scale", 224)])
def test_zstd_bombs_are_refused_without_being_expanded(name: str, size: int) -> None:
    bomb = zstandard.ZstdCompressor().compressobj(size=2**28)
    frame = b"".join(bomb.compress(bytes(2**20)) for _ in range(2**8)) + bomb.flush()
    assert len(frame) < 2**16
    entry, stored = _with_frame(frame, name)
    tracemalloc.start()
    with pytest.raises(ArtifactError, match=rf"^{name} expands to 268435456 bytes: the frame must declare {size},"):
        decode("w", entry, stored)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_zstd_frames_that_lie_or_do_not_say_their_size_are_refused() -> None:
    lying = bytearray(zstandard.ZstdCompressor().compress(bytes(200)))
    assert lying[5] == 200  # the frame header's content size
    lying[5] = 84
    with pytest.raises(ArtifactError, match=r"^w\.trits is not one zstd frame"):
        decode("w", *_with_frame(bytes(lying)))
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(84))
    with pytest.raises(ArtifactError, match=r"^w\.trits expands to an unknown number of bytes"):
        decode("w", *_with_frame(silent))
    whole = zstandard.ZstdCompressor().compress(bytes(84))
    with pytest.raises(ArtifactError, match=r"^w\.trits is not one zstd frame"):
        decode("w", *_with_frame(whole + whole))
    with pytest.raises(ArtifactError, match=r"^w\.trits is not one zstd frame"):
        decode("w", *_with_frame(b"not zstd"))


def test_bytes_that_are_not_five_digits_are_refused() -> None:
    frame = zstandard.ZstdCompressor().compress(bytes([243] * 84))
    with pytest.raises(ArtifactError, match=r"^w\.trits: byte 243 is not five base-3 digits"):
        decode("w", *_with_frame(frame))


def test_other_trits_than_the_checksum_are_refused() -> None:
    frame = zstandard.ZstdCompressor().compress(bytes([121] * 84))
    with pytest.raises(ArtifactError, match=r"^w is damaged: its decoded values do not have the sha256"):
        decode("w", *_with_frame(frame))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("w.scale", np.ones((2, 4, 7), np.float32), r"is float32 \[2, 4, 7\]: it must be uint8 with one axis"),
        ("w.trits", np.zeros(84, np.int8), r"is int8 \[84\]: it must be uint8 with one axis"),
        ("w.trits", np.zeros((84, 1), np.uint8), r"is uint8 \[84, 1\]: it must be uint8 with one axis"),
    ],
)
def test_stored_arrays_of_another_kind_are_refused(name: str, array: Any, message: str) -> None:
    entry, stored = encode("w", _tensor(), "float16")
    with pytest.raises(ArtifactError, match=f"^{name} {message}"):
        decode("w", entry, stored | {name: array})


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (np.ones((2, 3, 7), np.float32), "expands to 168 bytes: the frame must declare 224"),
        (np.ones((2, 4, 7), np.float16), "expands to 112 bytes: the frame must declare 224"),
        (np.full((2, 4, 7), np.nan, np.float32), "holds NaN or infinity"),
        (np.full((2, 4, 7), -1, np.float32), "is negative"),
    ],
)
def test_scales_that_do_not_fit_are_refused(scale: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=rf"^w\.scale {message}"):
        decode("w", *_with_frame(_frame(scale), "w.scale"))
