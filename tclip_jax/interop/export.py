"""Export a model as a folder that open_clip and transformers both load, optionally with GGUF files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.artifacts.safetensors import LazyArray, write_safetensors
from tclip_jax.data.images import Preprocess
from tclip_jax.data.tokenizer import Tokenizer
from tclip_jax.interop.examples import make_examples, write_check
from tclip_jax.interop.gguf import verify_gguf, write_gguf
from tclip_jax.interop.gguf_file import KINDS
from tclip_jax.interop.hugging_face import to_hugging_face
from tclip_jax.interop.hugging_face_config import hugging_face_config
from tclip_jax.interop.open_clip import lazy_state
from tclip_jax.interop.stablehlo import FOLDER, verify_stablehlo, write_stablehlo
from tclip_jax.models.config import CLIPConfig
from tclip_jax.pages import dotted
from tclip_jax.storage import atomic_folder
from tclip_jax.ternary import TernaryTensor

GGUF_KINDS = {f"gguf-{kind}": kind for kind in KINDS}
FORMATS = ("open_clip", "hf", *GGUF_KINDS, "stablehlo")

DTYPES = ("float32", "bfloat16", "float16")

_LIBRARIES = {"open_clip": "open_clip", "hf": "transformers"}  # format -> name of the library on the hub

# transformers refuses safetensors files without this metadata.
_METADATA = {"format": "pt"}

_CARD = """\
---
{library}pipeline_tag: zero-shot-image-classification
tags: [{tags}]
---
# {title}

{about}
{usage}{check}{table}"""

_CHECK = """
`python check.py` computes embeddings of stored inputs with these libraries, and compares them with the embeddings that
JAX computed at export.
"""

_USAGE = {
    "open_clip": """
```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
```
""",
    "hf": """
```python
from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("FOLDER")
# The default, torchvision, resizes differently: usually pixels by up to 2 of 255, and embeddings by about 1e-4.
processor = CLIPProcessor.from_pretrained("FOLDER", backend="pil")
```
""",
    "gguf": """
The GGUF files hold trits and scales, in llama.cpp's types and with clip.cpp's names. No runtime is known to run these
types in a CLIP with two towers. To read a file:

```python
from tclip_jax.interop.gguf import read_gguf

config, preprocess, params = read_gguf("FOLDER/FILE.gguf")
```
""",
    "stablehlo": """
The folder `stablehlo` holds both towers as programs of jax.export, for CPUs, TPUs and CUDA, with weights of 2 bits:

```python
from load import load  # in the folder stablehlo; pip install jax flatbuffers safetensors

encode_image, encode_text = load()
```
""",
}


def export_pytorch(
    folder: epath.PathLike,
    *,
    config: CLIPConfig,
    preprocess: Preprocess,
    params: Mapping[str, Any],
    formats: Sequence[str] = ("open_clip", "hf"),
    dtype: str = "float32",
    figures: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    check: bool = False,
    overwrite: bool = False,
) -> None:
    """Export a model as a folder that open_clip ("local-dir:…") and transformers (CLIPModel, CLIPProcessor) load.

    The folder is written atomically. In every format it has the tokenizer, open_clip_config.json and a model card.
    Weights are converted and written tensor by tensor.

    Args:
      folder: the folder, local or remote (gs://).
      config: the model.
      preprocess: the preprocessing of its images.
      params: parameter tree with `TernaryTensor` leaves, which open_clip and transformers get as scale · trit. Other
        leaves may be lazy.
      formats: any of `FORMATS`. A GGUF file is named after the folder, as in release-tq1_0.gguf. GGUF and
        StableHLO are verified.
      dtype: dtype of the weights for open_clip and transformers, one of `DTYPES`. Ternary weights with scales of 8
        significant bits are exact in all of them.
      figures: measured values for the model card, by name; nested values get dotted names.
      provenance: the origin of the model, for the model card, in the same form.
      check: run the model on example inputs, and write check.py, which compares the libraries' embeddings with them.
      overwrite: replace the folder if it is an earlier export.

    Raises:
      ValueError: CLIPModel, CLIPImageProcessor or GGUF cannot express the model or its preprocessing; the parameters or
        the image size do not match `config`; a format or dtype is unknown; weights are not finite in `dtype`; or a
        GGUF or StableHLO needs a package that is not installed; or what was written is not the model.
      FileExistsError: the folder exists.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if preprocess.size != config.vision.image_size:
        raise ValueError(f"preprocessing gives images of {preprocess.size}: the model takes {config.vision.image_size}")
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"format {unknown[0]!r} is not one of {', '.join(FORMATS)}")
    documents = {
        "open_clip_config.json": {"model_cfg": config.to_open_clip(), "preprocess_cfg": preprocess.to_open_clip()}
    }
    if "hf" in formats:
        documents["config.json"] = hugging_face_config(config, dtype)
        documents["preprocessor_config.json"] = preprocess.to_hugging_face()
    folder = epath.Path(folder)
    if folder.exists() and not (folder / "open_clip_config.json").exists():
        raise FileExistsError(f"{folder} exists and is not an earlier export: choose another folder")
    state = {key: _cast(key, value, jnp.dtype(dtype)) for key, value in lazy_state(params, config).items()}
    with atomic_folder(folder, overwrite=overwrite) as unfinished:
        # GGUF first: it is the format most likely to fail, for its groups, its scales or its package.
        for kind in (kind for name, kind in GGUF_KINDS.items() if name in formats):
            path = unfinished / f"{folder.name}-{kind}.gguf"
            write_gguf(path, config=config, preprocess=preprocess, params=params, kind=kind)
            verify_gguf(path, params)
        if "stablehlo" in formats:
            write_stablehlo(unfinished / FOLDER, config=config, params=params)
            verify_stablehlo(unfinished / FOLDER, config=config, params=params)
        for name, document in documents.items():
            (unfinished / name).write_text(json.dumps(document, indent=2) + "\n")
        if "open_clip" in formats:
            write_safetensors(unfinished / "open_clip_model.safetensors", state, _METADATA)
        if "hf" in formats:
            write_safetensors(unfinished / "model.safetensors", to_hugging_face(state, config), _METADATA)
        if check:
            write_check(unfinished, make_examples(config, params, dtype=dtype))
        Tokenizer(config.text.context_length).save(unfinished)
        (unfinished / "README.md").write_text(
            model_card(params, dtype, figures or {}, formats, check, provenance or {})
        )


def model_card(
    params: Mapping[str, Any],
    dtype: str,
    figures: Mapping[str, Any],
    formats: Sequence[str],
    check: bool = False,
    provenance: Mapping[str, Any] = {},
) -> str:
    """Return the README.md of an exported model: its weights, origin, usage, check and figures."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, TernaryTensor))
    total = sum(math.prod(leaf.shape) for leaf in leaves)
    ternary = sum(math.prod(leaf.shape) for leaf in leaves if isinstance(leaf, TernaryTensor))
    libraries = [name for name in _LIBRARIES if name in formats]
    kind = dtype if libraries else "GGUF" if any(name in GGUF_KINDS for name in formats) else "StableHLO"
    about = f"A CLIP model with {total:,} parameters, exported from tclip_jax as {kind}."
    if ternary:
        about += f" {ternary / total:.1%} of them are ternary (−1, 0 or +1 times a scale)."
    if ternary and libraries:
        about += (
            " The safetensors files store them as floats, scale · trit, and are as large as those of a float model."
        )
    table = ""
    for title, entries in (("measured", figures), ("provenance", provenance)):
        rows = "".join(f"| {_cell(name)} | {_cell(value)} |\n" for name, value in dotted(entries))
        table += f"\n| {title} | |\n|---|---|\n{rows}" if rows else ""
    usage = "".join(text for name, text in _USAGE.items() if any(chosen.startswith(name) for chosen in formats))
    title = "Ternary CLIP" if ternary else "CLIP"
    names = [_LIBRARIES[name] for name in libraries] + ["gguf"] * any(name in GGUF_KINDS for name in formats)
    names += ["stablehlo"] * ("stablehlo" in formats)
    return _CARD.format(
        library=f"library_name: {names[0]}\n" if libraries else "",
        tags=", ".join(["clip", *(["ternary"] if ternary else []), *names]),
        title=title,
        about=about,
        usage=usage,
        check=_CHECK if check else "",
        table=table,
    )


def _cell(value: Any) -> str:
    """Return a value as a table cell on one line, floats with six digits."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", r"\|")


def _cast(key: str, value: LazyArray, dtype: np.dtype[Any]) -> LazyArray:
    def load() -> npt.NDArray[Any]:
        with np.errstate(over="ignore"):
            cast = np.asarray(value).astype(dtype, copy=False)
        if not np.isfinite(cast).all():
            raise ValueError(f"{key} is not finite in {dtype.name}: NaN, infinity, or too large")
        return cast

    return LazyArray(value.shape, dtype, load)
