"""The formats of `tclip export`: a registry of functions that write and verify them.

`tclip export --help` lists it, so nothing here imports JAX before a format is written.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tclip_jax.interop.gguf_file import KINDS, Kind

if TYPE_CHECKING:
    from etils import epath

    from tclip_jax.artifacts.safetensors import LazyArray
    from tclip_jax.data.images import Preprocess
    from tclip_jax.interop.examples import Examples
    from tclip_jax.interop.onnx_graph import Form
    from tclip_jax.models.config import CLIPConfig

DTYPES = ("float32", "bfloat16", "float16")
ACCURACY_LEVELS = (4, 1)
ONNX_FOLDER = "onnx"  # where transformers.js looks
LITERT_FOLDER = "litert"

# transformers refuses safetensors files without this metadata.
_METADATA = {"format": "pt"}
Written = tuple[Sequence[str], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Job:
    """An export: the model, the options, and the unfinished folder.

    Attributes:
      folder: where to write.
      name: name of the finished folder.
      config: the model.
      preprocess: the preprocessing of its images.
      params: parameter tree with `QuantizedTensor` leaves; other leaves may be lazy.
      dtype: dtype of the weights that are stored as floats, one of `DTYPES`.
      accuracy_level: of ONNX Runtime's products with packed weights, see `Form`.
      batch: number of images or texts that LiteRT files take.
    """

    folder: epath.Path
    name: str
    config: CLIPConfig
    preprocess: Preprocess
    params: Mapping[str, Any]
    dtype: str
    accuracy_level: int
    batch: int

    @functools.cached_property
    def state(self) -> dict[str, LazyArray]:
        """open_clip's state dict in `dtype`, lazily."""
        from tclip_jax.interop.open_clip import lazy_state

        state = lazy_state(self.params, self.config)
        return {key: _cast(key, value, self.dtype) for key, value in state.items()}

    @functools.cached_property
    def examples(self) -> Callable[..., Examples]:
        """Example inputs with the model's embeddings by `dtype` and `floats`, see `make_examples`; computed once."""
        from tclip_jax.interop.examples import make_examples

        return functools.cache(functools.partial(make_examples, self.config, self.params))


class Format(NamedTuple):
    """A format of an export.

    Attributes:
      does: what the format is, a phrase for the help of `tclip export`.
      runs: what loads or runs its files, for the list of files.
      write: writes and verifies the files in the folder of a job; returns their names and lines on the verification.
      dtypes: the dtypes of floats that it takes; empty if the format fixes them.
    """

    does: str
    runs: str
    write: Callable[[Job], Written]
    dtypes: Sequence[str] = ()


def _write_open_clip(job: Job) -> Written:
    from tclip_jax.artifacts.safetensors import write_safetensors

    write_safetensors(job.folder / "open_clip_model.safetensors", job.state, _METADATA)
    return ["open_clip_model.safetensors"], []


def _write_hugging_face(job: Job) -> Written:
    from tclip_jax.artifacts.safetensors import write_safetensors
    from tclip_jax.interop.hugging_face import to_hugging_face

    write_safetensors(job.folder / "model.safetensors", to_hugging_face(job.state, job.config), _METADATA)
    return ["model.safetensors"], []


def _write_big_vision(job: Job) -> Written:
    from tclip_jax.interop.big_vision import to_big_vision, write_big_vision
    from tclip_jax.interop.big_vision_config import gelu_notes

    arrays = to_big_vision(job.params, job.config)
    write_big_vision(
        job.folder / "big_vision.npz", {key: _cast(key, value, job.dtype) for key, value in arrays.items()}
    )
    return ["big_vision.npz"], gelu_notes(job.config)


def _write_gguf(job: Job, kind: Kind) -> Written:
    from tclip_jax.interop.gguf import verify_gguf, write_gguf

    path = job.folder / f"{job.name}-{kind}.gguf"
    write_gguf(path, config=job.config, preprocess=job.preprocess, params=job.params, kind=kind)
    verify_gguf(path, job.params)
    return [path.name], []


def onnx_form(job: Job, packed: bool = True, dtype: str | None = None) -> Form:
    """Return the form of the ONNX files of a job."""
    from tclip_jax.interop.onnx import fewest_bits
    from tclip_jax.interop.onnx_graph import Form

    return Form(packed, dtype or job.dtype, job.accuracy_level, fewest_bits(job.params) or 2)


def _write_onnx(job: Job, *, packed: bool = True, dtype: str | None = None) -> Written:
    from tclip_jax.interop.onnx import FILES, file_name, verify_embeddings, verify_onnx, write_onnx
    from tclip_jax.interop.onnx_session import runtime_version

    form = onnx_form(job, packed, dtype)
    runtime_version(packed=form.packed)  # one that is too old is refused before it has to wait
    folder = job.folder / ONNX_FOLDER
    folder.mkdir(exist_ok=True)
    write_onnx(folder, config=job.config, preprocess=job.preprocess, params=job.params, form=form)
    verify_onnx(folder, job.config, job.params, form)
    note = verify_embeddings(folder, form, job.examples(dtype=form.dtype, floats=not form.packed))
    return [f"{ONNX_FOLDER}/{file_name(tower, form)}" for tower in FILES], [note]


def _write_litert(job: Job) -> Written:
    from tclip_jax.interop.litert import FILES, rounding_note, verify_embeddings, verify_litert, write_litert
    from tclip_jax.interop.litert_session import runtime_version

    runtime_version()  # one that is too old is refused before it has to wait
    folder = job.folder / LITERT_FOLDER
    folder.mkdir(exist_ok=True)
    write_litert(folder, config=job.config, preprocess=job.preprocess, params=job.params, batch=job.batch)
    verify_litert(folder, job.params)
    notes = [verify_embeddings(folder, job.examples()), *rounding_note(folder)]
    return [f"{LITERT_FOLDER}/{name}" for name in FILES.values()], notes


def _write_stablehlo(job: Job) -> Written:
    from tclip_jax.interop.stablehlo import FOLDER, verify_stablehlo, write_stablehlo

    write_stablehlo(job.folder / FOLDER, config=job.config, params=job.params)
    verify_stablehlo(job.folder / FOLDER, config=job.config, params=job.params)
    return [f"{FOLDER}/{path.name}" for path in sorted((job.folder / FOLDER).iterdir()) if path.suffix != ".py"], []


def _write_torch(job: Job) -> Written:
    from tclip_jax.interop.torch_packed import FOLDER, verify_torch, write_torch

    folder = job.folder / FOLDER
    write_torch(folder, config=job.config, preprocess=job.preprocess, params=job.params)
    note = verify_torch(folder, config=job.config, params=job.params, examples=job.examples())
    return [f"{FOLDER}/model.safetensors"], [note]


FORMATS: dict[str, Format] = {
    "open_clip": Format("weights as floats for open_clip", "open_clip", _write_open_clip, DTYPES),
    "hf": Format("weights as floats for transformers", "transformers", _write_hugging_face, DTYPES),
    "big_vision": Format("weights as floats for big_vision (.npz)", "big_vision", _write_big_vision, DTYPES),
    "onnx": Format(
        "2-, 4- and 8-bit weights for ONNX Runtime, OpenVINO and browsers",
        "onnxruntime 1.28 or newer, transformers.js, OpenVINO (static shapes)",
        _write_onnx,
        ("float32", "float16"),
    ),
    "onnx-fp32": Format(
        "weights as float32, to compare with onnx",
        "onnxruntime, transformers.js, OpenVINO",
        functools.partial(_write_onnx, packed=False, dtype="float32"),
    ),
    "onnx-fp16": Format(
        "the same in float16",
        "onnxruntime, transformers.js, OpenVINO",
        functools.partial(_write_onnx, packed=False, dtype="float16"),
    ),
    "litert": Format(
        "4- and 8-bit weights for LiteRT (TensorFlow Lite): phones, and CPUs",
        "ai-edge-litert 1.4 or newer, LiteRT on Android and iOS",
        _write_litert,
    ),
    "stablehlo": Format(
        "programs of jax.export with 2-bit weights, for CPUs, TPUs and CUDA",
        "jax alone, with stablehlo/load.py",
        _write_stablehlo,
    ),
    "torch": Format(
        "2-bit weights for PyTorch, open_clip and transformers on CPUs, with the package that runs them",
        "PyTorch, after pip install of the folder torch",
        _write_torch,
    ),
    **{
        f"gguf-{kind}": Format(
            f"trits and scales in llama.cpp's type {kind.upper()}",
            "nothing; tclip_jax reads it",
            functools.partial(_write_gguf, kind=kind),
        )
        for kind in KINDS
    },
}


def _cast(key: str, value: LazyArray, name: str) -> LazyArray:
    import jax.numpy as jnp

    from tclip_jax.artifacts.safetensors import LazyArray

    dtype = jnp.dtype(name)

    def load() -> npt.NDArray[Any]:
        with np.errstate(over="ignore"):
            cast = np.asarray(value).astype(dtype, copy=False)
        if not np.isfinite(cast).all():
            raise ValueError(f"{key} is not finite in {name}: NaN, infinity, or too large")
        return cast

    return LazyArray(value.shape, dtype, load)
