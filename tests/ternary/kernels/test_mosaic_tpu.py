"""The TPU kernels in Pallas' interpreter against NumPy float64, and the cases that they do not support."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from tclip_jax.ternary.kernels import layout, mosaic_tpu, mosaic_tpu_int8
from tclip_jax.ternary.kernels.layout import DEVICES, SMALLEST
from tclip_jax.ternary.kernels.reference import quantize_activations
from tclip_jax.ternary.kernels.tpu_dot import tpu_dot
from tclip_jax.ternary.tensor import TernaryTensor

# M, K, N, group: one row and a scale per channel; blocks that end within M and N; groups that end within K or a tile.
SHAPES = [
    (1, 130, 3, 130),
    (33, 300, 130, 100),
    (40, 300, 640, 256),
    (7, 77, 128, 5),
    (520, 300, 128, 256),
]
PATHS = [(mosaic_tpu, "A32"), (mosaic_tpu, "A16"), (mosaic_tpu, "A8"), (mosaic_tpu_int8, "A8")]


def weight(length: int, columns: int, group: int, seed: int = 0) -> TernaryTensor:
    """Trits and scales of 8 significant bits, as a quantizer returns."""
    draw = np.random.default_rng(seed)
    trits = draw.integers(-1, 2, (length, columns), np.int8)
    scale = (draw.integers(128, 256, (-(-length // group), columns)) / 4096).astype(np.float32)
    return TernaryTensor(jnp.asarray(trits), jnp.asarray(scale), group)


def dense(w: TernaryTensor) -> np.ndarray:
    scale = np.asarray(w.scale, np.float64)
    rows = np.arange(w.shape[0]) // w.group if len(scale) > 1 else np.zeros(w.shape[0], int)
    return np.asarray(w.trits) * scale[rows]


def multiply(module: ModuleType, x: jax.Array, w: TernaryTensor, activations: Any) -> jax.Array:
    matmul = functools.partial(module.matmul, activations=activations, interpret=True)
    return jax.jit(matmul)(x, module.pack(w))


def relative_error(result: jax.Array, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(result, np.float64) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("module", "activations"), PATHS, ids=lambda value: getattr(value, "NAME", value))
def test_equals_float64(module: ModuleType, activations: Any, shape: tuple[int, int, int, int]) -> None:
    rows, length, columns, group = shape
    w = weight(length, columns, group)
    x = jax.random.normal(jax.random.key(0), (rows, length))
    result = multiply(module, x, w, activations)
    assert result.shape == (rows, columns) and result.dtype == jnp.float32
    exact = np.asarray(x.astype(jnp.bfloat16) if activations == "A16" else x, np.float64)
    if activations == "A8":
        rounded, level = quantize_activations(x)
        exact = np.asarray(rounded, np.float64) * np.asarray(level, np.float64)
    assert relative_error(result, exact @ dense(w)) < 1e-6


@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_bf16_activations_lose_nothing_before_the_result_is_rounded(shape: tuple[int, int, int, int]) -> None:
    rows, length, columns, group = shape
    w = weight(length, columns, group)
    packed = mosaic_tpu.pack(w)
    x = jax.random.normal(jax.random.key(0), (rows, length), jnp.bfloat16)
    result = tpu_dot(
        layout.spread(x, group, 16, 128, -1),
        packed.data,
        packed.scale,
        order="bf16",
        group=layout.padded(group, 16),
        out_dtype=jnp.float32,
        device=SMALLEST,
        interpret=True,
    )[:, :columns]
    assert relative_error(result, np.asarray(x, np.float64) @ dense(w)) < 1e-6


def test_a_block_holds_all_of_k_for_some_rows_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[Any] = []

    def record(kernel: Any, **options: Any) -> Any:
        specs = [*options["in_specs"], options["out_specs"]]
        blocks.extend((spec.block_shape, spec.index_map(2, 1)) for spec in specs)
        return call(kernel, **options)

    call = pl.pallas_call
    monkeypatch.setattr(pl, "pallas_call", record)
    multiply(mosaic_tpu, jnp.ones((520, 300), jnp.bfloat16), weight(300, 640, 100), "A32")
    # Three groups of 100 are padded to 128: K is 384, which 24 rows of words hold.
    assert blocks == [
        ((288, 384), (1, 0)),
        ((24, 640), (0, 2)),
        ((3, 640), (0, 2)),
        ((288, 640), (1, 2)),
    ]


def test_rows_do_not_depend_on_each_other() -> None:
    """An infinity, and the padding after the last row of a block, affect no other row."""
    w = weight(128, 128, 128)
    x = jax.random.normal(jax.random.key(0), (600, 128), jnp.bfloat16)
    clean, dirty = (multiply(mosaic_tpu, rows, w, "A32") for rows in (x, x.at[3].set(jnp.inf)))
    np.testing.assert_array_equal(np.delete(dirty, 3, 0), np.delete(clean, 3, 0))


def test_layers_are_scanned() -> None:
    layers = [weight(160, 130, 40, seed) for seed in range(2)]
    x = jax.random.normal(jax.random.key(0), (4, 160))

    def step(carry: None, w: Any) -> tuple[None, jax.Array]:
        return carry, mosaic_tpu_int8.matmul(x, w, activations="A8", interpret=True)

    _, results = jax.lax.scan(step, None, mosaic_tpu_int8.pack(jax.tree.map(lambda *leaf: jnp.stack(leaf), *layers)))
    for w, result in zip(layers, results, strict=True):
        np.testing.assert_allclose(result, multiply(mosaic_tpu_int8, x, w, "A8"), rtol=1e-6, atol=1e-6)


GIVEN: dict[str, Any] = {
    "device_kind": "TPU v5 lite",
    "platform": "tpu",
    "rows": 197,
    "shape": (768, 3072),
    "group": 256,
    "dtype": jnp.dtype(jnp.bfloat16),
    "activations": "A32",
}


@pytest.mark.parametrize(
    ("module", "changes", "reason"),
    [
        (mosaic_tpu, {}, None),
        (mosaic_tpu, {"device_kind": "TPU v4", "activations": "A8"}, None),
        (mosaic_tpu, {"platform": "cpu"}, "platform cpu"),
        (mosaic_tpu, {"device_kind": "TPU v3"}, "not for TPU v3"),
        (mosaic_tpu, {"dtype": jnp.dtype(jnp.float16)}, "not float16"),
        (mosaic_tpu, {"shape": (10**6, 128)}, "K of 1000000"),
        (mosaic_tpu_int8, {}, "A8"),
        (mosaic_tpu_int8, {"activations": "A8"}, None),
        (mosaic_tpu_int8, {"activations": "A8", "device_kind": "TPU v4"}, "no int8 matrix unit"),
        (mosaic_tpu_int8, {"activations": "A8", "platform": "gpu"}, "platform gpu"),
    ],
)
def test_says_where_it_cannot_run(module: ModuleType, changes: dict[str, Any], reason: str | None) -> None:
    refusal = module.unsupported(**{**GIVEN, **changes})
    assert refusal is None if reason is None else reason in refusal


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_takes_the_largest_k_of_which_the_smallest_block_fits(kind: str, dtype: Any) -> None:
    """The block is 32 x 128: x, words and product count twice, weights and float32 sums once."""
    size = jnp.dtype(dtype).itemsize
    a_k, fixed = 2 * 32 * size + 2 * 128 // 4 + 128 * size, 32 * 128 * (2 * size + 4)
    largest = (DEVICES[kind].vmem * 3 // 4 - fixed) // a_k
    arguments = {**GIVEN, "device_kind": kind, "dtype": jnp.dtype(dtype)}
    assert mosaic_tpu.unsupported(**{**arguments, "shape": (largest, 1)}) is None
    assert mosaic_tpu.unsupported(**{**arguments, "shape": (largest + 1, 1)}) == f"K of {largest + 1} does not fit VMEM"


@pytest.mark.parametrize(
    ("order", "dtype", "rows", "group", "dots"),
    [
        ("bf16", jnp.bfloat16, 256, 128, 3),  # few rows: the sums are scaled
        ("bf16", jnp.bfloat16, 257, 128, 1),  # many rows: the weights are scaled
        ("bf16", jnp.bfloat16, 8, 64, 1),  # groups end within a tile: the weights are scaled
        ("bf16", jnp.bfloat16, 8, 384, 1),  # one scale
        ("bf16", jnp.float32, 8, 128, 1),
        ("int8", jnp.int8, 8, 128, 3),
        ("int8", jnp.int8, 600, 128, 3),
    ],
)
def test_scales_multiply_weights_or_sums_whichever_is_less(
    order: Any, dtype: Any, rows: int, group: int, dots: int
) -> None:
    groups = -(-384 // group)
    kernel = functools.partial(tpu_dot, order=order, group=group, out_dtype=jnp.float32, device=SMALLEST)
    x, words, scale = jnp.zeros((rows, 384), dtype), jnp.zeros((24, 128), jnp.int32), jnp.ones((groups, 128))
    assert str(jax.make_jaxpr(kernel)(x, words, scale)).count("dot_general[") == dots


def test_says_where_it_would_be_slower() -> None:
    assert mosaic_tpu.slower(**GIVEN) is None and mosaic_tpu_int8.slower(**GIVEN) is None
    assert "six bf16 passes" in mosaic_tpu.slower(**{**GIVEN, "dtype": jnp.dtype(jnp.float32)})
    assert "padded to 128" in mosaic_tpu_int8.slower(**{**GIVEN, "group": 64})


def test_int8_refuses_float_activations() -> None:
    packed = mosaic_tpu_int8.pack(weight(128, 128, 128))
    with pytest.raises(ValueError, match="must be 'A8'"):
        mosaic_tpu_int8.matmul(jnp.ones((1, 128)), packed, activations="A32", interpret=True)
