"""Export both towers as serialized StableHLO programs of `jax.export`, which run with jax and without this package.

    stablehlo/image.bin            the image tower: (its weights, pixels) -> embeddings
    stablehlo/text.bin             the text tower: (its weights, tokens) -> embeddings
    stablehlo/weights.safetensors  the weights of both by path; four trits to a byte, scales in float32 under PATH.scale
    stablehlo/load.py              a loader that imports jax, numpy and safetensors

The programs take batches of any size. They unpack trits layer by layer, multiply in float32 at the highest precision,
and contain no kernel of this package, so the same file runs on every platform of `PLATFORMS`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict
from jax import export

from tclip_jax.artifacts.pack import flatten, repack_params
from tclip_jax.artifacts.safetensors import LazyArray, LazyStack, read_safetensors, write_safetensors
from tclip_jax.interop.examples import make_examples
from tclip_jax.models.clip import CLIP
from tclip_jax.models.config import CLIPConfig
from tclip_jax.ternary import PackedTensor, UniformTensor
from tclip_jax.ternary.kernels import reference

FOLDER = "stablehlo"
PLATFORMS = ("cpu", "tpu", "cuda")
TOWERS = ("image", "text")
BUDGET = 1e-5  # largest difference of an embedding's component from that of the model
_SCALE = ".scale"  # ends the name of a packed weight's scales

_LOADER = '''\
"""Load both towers: image, text = load(). They take normalised float32 pixels (N, H, W, 3), or int32 tokens (N, T).

Needs: pip install jax flatbuffers safetensors
"""

import pathlib

import jax
import numpy as np
from safetensors.numpy import load_file


def load(folder=pathlib.Path(__file__).resolve().parent):
    """Return functions that encode images and texts as L2-normalised float32 embeddings; N is any number."""
    weights = load_file(folder / "weights.safetensors")

    def tower(name):
        call = jax.jit(jax.export.deserialize(bytearray((folder / f"{name}.bin").read_bytes())).call)
        own = jax.device_put({path: value for path, value in weights.items() if path.startswith(f"{name}/")})
        return lambda batch: np.asarray(call(own, batch))

    return tower("image"), tower("text")
'''

# Runs beside load.py in a process of its own, which cannot import this package.
_CHECK = """\
import sys
sys.modules["tclip_jax"] = None
import numpy as np
from load import load
with np.load(sys.argv[1]) as given:
    for tower, inputs, encode in zip(("image", "text"), ("pixels", "tokens"), load()):
        print(tower, float(np.abs(encode(given[inputs]) - given[tower]).max()))
"""


def write_stablehlo(folder: epath.Path, *, config: CLIPConfig, params: Mapping[str, Any]) -> None:
    """Write the programs, their weights and the loader into `folder`, a new folder.

    Args:
      folder: the folder, local or remote.
      config: the model.
      params: parameter tree with `QuantizedTensor` leaves; other leaves may be lazy.

    Raises:
      ValueError: the package flatbuffers, which jax.export needs, is not installed.
    """
    if not importlib.util.find_spec("flatbuffers"):
        raise ValueError("jax.export needs the package flatbuffers: pip install 'tclip-jax[stablehlo]'")
    weights = flatten(repack_params(params, implementation=reference.NAME))
    folder.mkdir(parents=True, exist_ok=True)
    for tower in TOWERS:
        own = {path: weight for path, weight in weights.items() if path.startswith(f"{tower}/")}
        (folder / f"{tower}.bin").write_bytes(_program(config, tower, own))
    write_safetensors(folder / "weights.safetensors", _arrays(weights))
    (folder / "load.py").write_text(_LOADER)


def verify_stablehlo(folder: epath.Path, *, config: CLIPConfig, params: Mapping[str, Any]) -> None:
    """Compare a written folder with the model: weights bit for bit, embeddings to within `BUDGET`.

    The loader runs on the CPU, in a process that cannot import this package.

    Args:
      folder: what `write_stablehlo` wrote.
      config: the model.
      params: the parameters that were written.

    Raises:
      ValueError: a weight or an embedding differs, or the loader fails; the message names it.
    """
    stored = read_safetensors(folder / "weights.safetensors")
    for name, array in _arrays(flatten(repack_params(params, implementation=reference.NAME))).items():
        if np.asarray(stored[name]).tobytes() != np.asarray(array).tobytes():
            raise ValueError(f"{folder / 'weights.safetensors'}: {name} is not the weight of the model")
    examples = make_examples(config, params, count=3)
    with tempfile.TemporaryDirectory() as local:
        for name in ("image.bin", "text.bin", "weights.safetensors", "load.py"):
            (folder / name).copy(epath.Path(local) / name)
        given = pathlib.Path(local) / "examples.npz"
        np.savez(given, pixels=examples.pixels, tokens=examples.tokens, image=examples.image, text=examples.text)
        # The device of this process may have no memory left for another.
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", _CHECK, str(given)]
        ran = subprocess.run(command, cwd=local, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise ValueError(f"{folder / 'load.py'} fails: {['no message', *ran.stderr.strip().splitlines()][-1]}")
    for line in ran.stdout.splitlines():
        tower, error = line.split()
        if not float(error) <= BUDGET:
            raise ValueError(f"{folder / tower}.bin: its embeddings differ by {error} from those of the model")


def _program(config: CLIPConfig, tower: str, weights: Mapping[str, Any]) -> bytes:
    """Return the serialized program of a tower, with a batch of any size."""
    (batch,) = export.symbolic_shape("batch")
    height, width = config.vision.image_size
    inputs = {
        "image": jax.ShapeDtypeStruct((batch, height, width, 3), jnp.float32),
        "text": jax.ShapeDtypeStruct((batch, config.text.context_length), jnp.int32),
    }
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in _arrays(weights).items()}
    function = export.export(jax.jit(_encoder(config, tower, weights)), platforms=PLATFORMS)
    with jax.default_matmul_precision("highest"), _no_source_paths():
        return bytes(function(shapes, inputs[tower]).serialize())


@contextlib.contextmanager
def _no_source_paths() -> Iterator[None]:
    """Keep the paths of this machine's source files out of programs, which otherwise name those of each operation."""
    option = "jax_traceback_in_locations_limit"
    before = jax.config.values[option]
    jax.config.update(option, 0)
    try:
        yield
    finally:
        jax.config.update(option, before)


def _encoder(config: CLIPConfig, tower: str, weights: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the function of a tower that is exported; of `weights` it uses only how the arrays are packed."""
    packed = {path: weight for path, weight in weights.items() if isinstance(weight, PackedTensor | UniformTensor)}

    def encode(arrays: dict[str, jax.Array], batch: jax.Array) -> jax.Array:
        leaves: dict[str, Any] = {path: array for path, array in arrays.items() if not path.endswith(_SCALE)}
        for path, weight in packed.items():
            leaves[path] = dataclasses.replace(weight, data=arrays[path], scale=arrays[path + _SCALE])
        # The module declares the logit scale in either tower, and uses it in none.
        params = unflatten_dict({**leaves, "logit_scale": jnp.zeros(())}, sep="/")
        return CLIP(config).apply({"params": params}, batch, method=f"encode_{tower}")  # type: ignore[return-value]

    return encode


def _arrays(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays of packed weights and the other leaves, by the names that the programs have for them."""
    arrays: dict[str, Any] = {}
    for path, weight in weights.items():
        if isinstance(weight, PackedTensor | UniformTensor):
            arrays[path] = np.asarray(weight.data)
            arrays[path + _SCALE] = np.asarray(weight.scale, np.float32)
        else:
            arrays[path] = weight if isinstance(weight, LazyArray | LazyStack) else np.asarray(weight)
    return arrays
