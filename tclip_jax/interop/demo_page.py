"""Add a page to an ONNX export that classifies and searches pictures in a browser, with onnxruntime-web.

    index.html, style.css, *.js   the page
    demo.json                     what it reads: the towers, the preprocessing, the runtime, reference embeddings
    onnxruntime-web/              the runtime, if it is not loaded from a content delivery network

The reference are inputs with the embeddings of the model in JAX. The page embeds them too before it trusts a backend.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import pathlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt
from etils import epath
from packaging.version import InvalidVersion, Version
from PIL import Image

from tclip_jax.artifacts.pack import flatten
from tclip_jax.data.sources import open_source
from tclip_jax.data.tokenizer import VOCAB_SIZE, Tokenizer
from tclip_jax.interop.examples import embed
from tclip_jax.interop.formats import ONNX_FOLDER, Job, onnx_form
from tclip_jax.interop.onnx import FILES, MIN_COSINE, file_name
from tclip_jax.interop.onnx_graph import pads
from tclip_jax.models.config import CLIPConfig
from tclip_jax.ternary import TernaryTensor

PAGE = ("index.html", "style.css", "main.js", "model.js", "tokenizer.js", "pixels.js", "digit.js")
RUNTIME = "onnxruntime-web"
# What the page was tested with.
RUNTIME_VERSION = "1.30.0"
CDN = f"https://cdn.jsdelivr.net/npm/{RUNTIME}@{RUNTIME_VERSION}/dist/"
# The code and the binary for each backend; those for WebGPU also run in WebAssembly.
RUNTIME_FILES = {
    "wasm": ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": ("ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
}
CDN_INTEGRITY = {  # of the npm package, which the network delivers unchanged
    "ort.wasm.bundle.min.mjs": "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    "ort-wasm-simd-threaded.wasm": "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
    "ort.webgpu.bundle.min.mjs": "sha384-1ntMeyj+z5diX6vBR5h+zlJBPc4iNvhCxE6nlammh8daBYcLBZkzrwDkuJjhwI+f",
    "ort-wasm-simd-threaded.asyncify.wasm": "sha384-EPVDLTxuO663dkZO/pcKJF6vOyyfq/5z9FY1oksN0UWFX2ABH4wDDZQHeNoUleWR",
}
LABELS = ("a cat", "a dog", "a person", "a building", "food", "a landscape", "a car", "a text on paper")
TEMPLATE = "a photo of {}"
_CAPTIONS = ("a photo of a cat", "Zwei Hunde am Strand, 3 o'clock! 🐕")
_DIGITS = 8  # samples on the page


def check_demo(config: CLIPConfig, runtime: epath.PathLike | None) -> None:
    """Raise the errors of `write_demo` that need no weights: they come before the work."""
    if config.text.hf_tokenizer_name:
        raise ValueError(f"the tokenizer is {config.text.hf_tokenizer_name!r:.80}: the page has only CLIP's own")
    if config.text.vocab_size != VOCAB_SIZE:
        raise ValueError(f"vocab_size {config.text.vocab_size}: the page has CLIP's tokenizer, of {VOCAB_SIZE} tokens")
    if runtime is not None:
        find_runtime(runtime)


def write_demo(job: Job, *, digits: bool, runtime: epath.PathLike | None = None) -> str:
    """Write the page into the folder of an export that has the packed ONNX files and the tokenizer.

    Args:
      job: the export.
      digits: whether the model was trained on the digits: the page then has a canvas, samples and their labels.
      runtime: the npm package onnxruntime-web, or a folder whose node_modules has it, whose files are copied. None: the
        page loads `RUNTIME_VERSION` from `CDN`.

    Returns:
      What runs the page, in one line.

    Raises:
      ValueError: the model has another vocabulary than the tokenizer, or `runtime` is no usable onnxruntime-web.
    """
    check_demo(job.config, runtime)
    source, form = resources.files(__package__) / "demo", onnx_form(job)
    for name in PAGE:
        (job.folder / name).write_bytes((source / name).read_bytes())
    files = {tower: f"{ONNX_FOLDER}/{file_name(tower, form)}" for tower in FILES}
    labels, template, samples = _digits() if digits else (LABELS, TEMPLATE, [])
    leaves = flatten(job.params)
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in leaves.items()}
    ternary = sum(size for path, size in sizes.items() if isinstance(leaves[path], TernaryTensor))
    described = {
        "towers": {t: {"file": file, "bytes": (job.folder / file).stat().length} for t, file in files.items()},
        "preprocess": job.preprocess.to_open_clip(),
        "context_length": job.config.text.context_length,
        "padded": pads(job.config.text),
        "logit_scale": float(np.exp(np.asarray(leaves["logit_scale"]))),
        "ternary": ternary / sum(sizes.values()),
        "labels": labels,
        "template": template,
        "digits": digits,
        "samples": samples,
        "runtime": _copy_runtime(job.folder, runtime) if runtime else _described(CDN, CDN_INTEGRITY),
        "min_cosine": MIN_COSINE,
        "reference": _reference(job),
    }
    (job.folder / "demo.json").write_text(json.dumps(described, indent=1) + "\n")
    where = "copied" if runtime else f"{RUNTIME_VERSION} from {CDN.split('/')[2]}"
    return f"index.html: {RUNTIME} {where}; python -m http.server -d FOLDER serves it"


def find_runtime(path: epath.PathLike) -> pathlib.Path:
    """Return the folder dist of an npm package onnxruntime-web.

    Args:
      path: the package, or a folder whose node_modules has it.

    Raises:
      ValueError: there is none, it is older than `RUNTIME_VERSION`, or a file is missing.
    """
    places = [pathlib.Path(path), pathlib.Path(path) / "node_modules" / RUNTIME]
    package = next(
        (place for place in places if (place / "package.json").is_file() and (place / "dist").is_dir()), None
    )
    if package is None:
        raise ValueError(
            f"{path} is not the npm package {RUNTIME}, and has none in node_modules: npm install {RUNTIME}"
        )
    try:
        described = json.loads((package / "package.json").read_bytes())
        name, version = described["name"], Version(described["version"])
    except (ValueError, KeyError, TypeError, RecursionError, InvalidVersion) as error:
        raise ValueError(f"{package / 'package.json'} states no name and version: {error!r:.100}") from None
    if name != RUNTIME or version < Version(RUNTIME_VERSION):
        raise ValueError(f"{package} is {name!r:.40} {version}: {RUNTIME} {RUNTIME_VERSION} or newer is needed")
    for file in sum(RUNTIME_FILES.values(), ()):
        if not (package / "dist" / file).is_file():
            raise ValueError(f"{package} has no dist/{file}: install {RUNTIME} {RUNTIME_VERSION}")
    return package / "dist"


def integrity(content: bytes) -> str:
    """Return the hash of a file as browsers check it (Subresource Integrity)."""
    return "sha384-" + base64.b64encode(hashlib.sha384(content).digest()).decode()


def _copy_runtime(folder: epath.Path, runtime: epath.PathLike) -> dict[str, Any]:
    source, hashes = find_runtime(runtime), dict[str, str]()
    (folder / RUNTIME).mkdir()
    for file in sum(RUNTIME_FILES.values(), ()):
        content = (source / file).read_bytes()
        (folder / RUNTIME / file).write_bytes(content)
        hashes[file] = integrity(content)
    return _described(f"{RUNTIME}/", hashes)


def _described(base: str, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Return where the runtime is, for demo.json: files in the order code, binary."""
    files = {
        kind: [{"file": name, "integrity": hashes[name]} for name in names] for kind, names in RUNTIME_FILES.items()
    }
    return {"base": base, "files": files}


def _reference(job: Job) -> dict[str, Any]:
    """Return a picture and captions with their embeddings: inputs of the page, so that they test all of its steps."""
    rough = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    picture = Image.fromarray(rough).resize((44, 33), Image.Resampling.BICUBIC)
    pixels, tokens = job.preprocess([picture]), Tokenizer(job.config.text.context_length)(_CAPTIONS)
    image, text = embed(job.config, job.params, pixels, tokens, dtype=job.dtype)
    return {
        "pictures": [_data_url(picture)],
        "captions": _CAPTIONS,
        "image": _rounded(image),
        "text": _rounded(text),
    }


def _rounded(embeddings: npt.NDArray[np.float32]) -> list[list[float]]:
    return [[round(float(value), 6) for value in row] for row in embeddings]


def _digits() -> tuple[tuple[str, ...], str, list[dict[str, str]]]:
    """Return labels, template and sample pictures of the digits."""
    source: Any = open_source("digits", "test")
    samples = [
        {"url": _data_url(Image.fromarray(record.image)), "name": f"test image: {source.classnames[record.label]}"}
        for record in (source[i] for i in range(_DIGITS))
    ]
    return source.classnames, source.templates[0].replace("{c}", "{}"), samples


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
