"""The operator and the layers of tclip_torch, against float64: on the native kernel, and in PyTorch alone."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import tclip_jax
from tclip_jax.ternary.kernels.native_cpu import LIBRARY

torch = pytest.importorskip("torch", reason="PyTorch is not installed (pip install -e '.[test]')")

import tclip_torch  # noqa: E402  it imports torch
from tclip_torch import linear as layers  # noqa: E402

pytestmark = pytest.mark.torch

PACKAGE = pathlib.Path(tclip_torch.__file__).parent
MOST = {"A16": 32767, "A8": 127}
Array = np.ndarray[Any, Any]


@pytest.fixture(params=["kernel", "fallback"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Products by the kernel, which is in the library of tclip_jax too, or by PyTorch."""
    monkeypatch.setenv("TCLIP_TORCH_LIBRARY", str(LIBRARY if request.param == "kernel" else "/dev/null"))
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if request.param == "kernel" and layers.kernel() is None:
            pytest.skip("the native library was not built by this version: pip install -e .")
        layers.kernel()
    yield request.param
    forget()


def forget() -> None:
    layers.kernel.cache_clear()
    layers.instruction_sets.cache_clear()


def pack(trits: Array, scales: Array, group: int) -> tuple[Any, Any]:
    """Words and scales of trits (K, N) and scales (groups, N), element by element, as linear.py describes them."""
    length, columns = trits.shape
    panels, padded = -(-columns // 32), -(-group // 16) * 16
    rest = -(-(length % group) // 16) * 16
    words = np.full((panels, (length // group * padded + rest) // 16, 32), 0x55555555, np.uint32)
    for k in range(length):
        place = k // group * padded + k % group
        chunk, i = divmod(place, 16)
        shift = 8 * (i % 4) + 2 * (i // 4)
        for n in range(columns):
            word = int(words[n // 32, chunk, n % 32]) & ~(3 << shift) | (int(trits[k, n]) + 1) << shift
            words[n // 32, chunk, n % 32] = word
    levels = np.zeros((panels, len(scales), 32), np.float32)
    for n in range(columns):
        levels[n // 32, :, n % 32] = scales[:, n]
    return torch.from_numpy(words.view(np.int32)), torch.from_numpy(levels)


def case(rows: int, length: int, columns: int, group: int) -> tuple[Any, ...]:
    """Activations, trits, scales of 8 significant bits, and a bias."""
    rng = np.random.default_rng(rows)
    trits = rng.integers(-1, 2, (length, columns), np.int8)
    scales = (rng.integers(128, 256, (-(-length // group), columns)) / 1024).astype(np.float32)
    x, bias = rng.standard_normal((rows, length), np.float32), rng.standard_normal(columns, np.float32)
    return x, trits, scales, bias


def expected(x: Array, trits: Array, scales: Array, group: int, activations: str) -> Array:
    """The product in float64, of rounded activations."""
    levels: Any = 1
    if activations != "A32":
        # The rounding is defined in float32.
        largest = np.abs(x).max(-1, keepdims=True)
        x, levels = np.rint(x * (np.float32(MOST[activations]) / largest)), np.float64(largest) / MOST[activations]
    return levels * np.float64(x) @ (trits * np.repeat(np.float64(scales), group, 0)[: len(trits)])


@pytest.mark.parametrize(
    ("rows", "length", "columns", "group"),
    [(1, 64, 32, 32), (50, 100, 45, 20), (197, 40, 33, 256), (257, 300, 7, 256), (0, 16, 8, 16), (13, 48, 64, 24)],
)
@pytest.mark.parametrize("activations", layers.ACTIVATIONS)
def test_products_of_any_shape(
    rows: int, length: int, columns: int, group: int, activations: str, product: str
) -> None:
    x, trits, scales, bias = case(rows, length, columns, group)
    words, levels = pack(trits, scales, group)
    y = layers.linear(torch.from_numpy(x), words, levels, torch.from_numpy(bias), columns, group, activations)
    exact = expected(x, trits, scales, group, activations) + bias
    np.testing.assert_allclose(y, exact, rtol=0, atol=2e-5)
    assert y.shape == (rows, columns) and y.dtype == torch.float32
    narrow = layers.linear(torch.from_numpy(x), words, levels.bfloat16(), None, columns, group, activations)
    np.testing.assert_allclose(narrow + torch.from_numpy(bias), exact, rtol=0, atol=2e-5)


def test_bfloat16_activations(product: str) -> None:
    x, trits, scales, bias = case(9, 96, 40, 32)
    words, levels = pack(trits, scales, 32)
    narrow = torch.from_numpy(x).bfloat16().reshape(3, 3, 96)
    y = layers.linear(narrow, words, levels, torch.from_numpy(bias), 40, 32, "A32")
    exact = expected(narrow.float().numpy().reshape(9, 96), trits, scales, 32, "A32") + bias
    assert y.dtype == torch.bfloat16 and y.shape == (3, 3, 40)
    np.testing.assert_allclose(y.float().reshape(9, 40), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("activations", layers.ACTIVATIONS)
def test_what_is_not_finite_stays_in_its_row(activations: str, product: str) -> None:
    x, trits, scales, _ = case(3, 32, 32, 32)
    x[1, 3] = np.nan
    words, levels = pack(trits, scales, 32)
    y = layers.linear(torch.from_numpy(x), words, levels, None, 32, 32, activations)
    assert not torch.isfinite(y[1]).any() and torch.isfinite(y[[0, 2]]).all()


def packed_layer(activations: str = "A32") -> Any:
    _, trits, scales, bias = case(5, 64, 40, 32)
    return layers.PackedLinear(*pack(trits, scales, 32), torch.from_numpy(bias), (40, 64), 32, activations)


def test_the_operator_passes_pytorch_s_checks(product: str) -> None:
    layer, x = packed_layer(), torch.randn(2, 5, 64)
    arguments = (layer.words, layer.scales.view(torch.float32), layer.bias.detach(), 40, 32, "A16")
    for given in (x, x[:, ::2], x.transpose(0, 1)):
        torch.library.opcheck(layers.linear, (given, *arguments))


def test_the_layer_compiles_without_a_break_and_for_any_number_of_rows(product: str) -> None:
    layer = packed_layer("A8")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for rows in (1, 50, 197):
            x = torch.randn(rows, 64)
            assert torch.equal(compiled(x), layer(x))


def test_bits_do_not_depend_on_the_number_of_threads(product: str) -> None:
    x, trits, scales, _ = case(400, 256, 96, 256)
    words, levels = pack(trits, scales, 256)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(layers.linear(torch.from_numpy(x), words, levels, None, 96, 256, "A16"))
    finally:
        torch.set_num_threads(before)
    if product == "kernel":
        assert all(torch.equal(result, results[0]) for result in results)


# Without PyTorch, so without OpenMP: the kernel starts threads.
ALONE = """
import ctypes, sys
import numpy as np
library = ctypes.CDLL(sys.argv[1])
library.TclipInstructions.restype = library.TclipLinear1.restype = ctypes.c_char_p
best = next(i for i in range(9) if library.TclipInstructions(ctypes.c_int64(i)))
x, y = np.ones((700, 1024), np.float32), np.zeros((700, 64), np.float32)
words, scales = np.full((2, 64, 32), 0xAAAAAAAA, np.uint32), np.full((2, 4, 32), 0.5, np.float32)
at = lambda array: ctypes.c_void_p(array.ctypes.data)
given = [at(x), at(y), 0, 700, 1024, 64, at(words), words.size, at(scales), scales.size, 0, None, 256, 2, best, 3]
wrong = library.TclipLinear1(*(ctypes.c_int64(each) if isinstance(each, int) else each for each in given))
assert wrong is None, wrong
np.testing.assert_allclose(y, 512, rtol=1e-6)
assert not hasattr(ctypes.CDLL(None), "GOMP_parallel") and "torch" not in sys.modules
given[7] -= 1
wrong = library.TclipLinear1(*(ctypes.c_int64(each) if isinstance(each, int) else each for each in given))
assert wrong == b"operands do not fit together", wrong
"""


def test_the_kernel_needs_no_pytorch_and_refuses_what_does_not_fit(product: str) -> None:
    if product == "kernel":
        ran = subprocess.run([sys.executable, "-c", ALONE, str(LIBRARY)], capture_output=True, text=True, timeout=900)
        assert ran.returncode == 0, ran.stderr


def test_what_a_layer_refuses(product: str) -> None:
    layer = packed_layer()
    with pytest.raises(TypeError, match=r"torch\.float16: packed layers take torch\.float32 and torch\.bfloat16$"):
        layer(torch.zeros(2, 64, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"x is \(2, 63\): its last axis must be the 64 inputs of the layer$"):
        layer(torch.zeros(2, 63))
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        layer(torch.zeros(2, 64, requires_grad=True)).sum().backward()
    attention = layers.PackedAttention(layer, layer, 2)
    x = torch.zeros(1, 2, 64)
    with pytest.raises(ValueError, match="self-attention without weights"):
        attention(x, x, x.clone())


def test_scales_keep_their_values_when_a_layer_changes_its_dtype(product: str) -> None:
    layer = packed_layer()
    before = layer.scales.clone()
    moved = layer.bfloat16()
    assert torch.equal(moved.scales, before) and moved.bias.dtype == moved.int8_original_dtype == torch.bfloat16
    assert moved(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_without_its_kernel_the_package_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCLIP_TORCH_LIBRARY", "/nowhere/libtclip_torch.so")
    forget()
    layer, x = packed_layer(), torch.zeros(1, 64)
    with pytest.warns(UserWarning, match="no native kernel, PyTorch multiplies instead, slowly: .*/nowhere") as caught:
        layer(x)
        layer(x)
    assert len(caught) == 1 and tclip_torch.default_activations() == "A32"
    forget()


def test_the_package_imports_torch_and_safetensors_alone() -> None:
    modules: set[str] = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(str(node.module).split(".")[0])
    assert modules - set(sys.stdlib_module_names) == {"torch", "safetensors", "tclip_torch"}
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    assert project["version"] == tclip_jax.__version__
    assert all(len(path.read_text().splitlines()) <= 400 for path in PACKAGE.glob("*.py"))
