"""One folder that open_clip and transformers both load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import safetensors.numpy
from etils import epath

from tclip_jax.data.images import Preprocess
from tclip_jax.data.tokenizer import Tokenizer
from tclip_jax.interop.hugging_face import hugging_face_config, to_hugging_face
from tclip_jax.interop.open_clip import State, to_open_clip
from tclip_jax.models.config import CLIPConfig
from tclip_jax.storage import atomic_folder
from tclip_jax.ternary import TernaryTensor

_DTYPES = ("float32", "bfloat16", "float16")

_CARD = """\
---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags: [clip, transformers, ternary]
---
# {title}

{about}

```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
```

```python
from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("FOLDER")
processor = CLIPProcessor.from_pretrained("FOLDER", backend="pil")  # torchvision resizes a little differently
```
{table}"""


def export_pytorch(
    folder: epath.PathLike,
    *,
    config: CLIPConfig,
    preprocess: Preprocess,
    params: Mapping[str, Any],
    dtype: str = "float32",
    figures: Mapping[str, float | str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the folder that open_clip ("local-dir:…") and transformers (CLIPModel, CLIPProcessor) load, or nothing.

    Args:
      folder: local, or gs:// and its like.
      config: of the model.
      preprocess: of its images.
      params: ternary weights as `TernaryTensor`; they are stored as scale · trit.
      dtype: of the stored weights. Scales of 8 significant bits make ternary weights exact in all three.
      figures: measured values for the model card, by name.
      overwrite: replace the folder if it exists.

    Raises:
      ValueError: what CLIPModel or CLIPImageProcessor cannot express, parameters that are not those of `config`, an
        image size that is not the model's, or a dtype other than float32, bfloat16 and float16.
      FileExistsError: the folder exists.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    if preprocess.size != config.vision.image_size:
        raise ValueError(f"preprocessing gives images of {preprocess.size}: the model takes {config.vision.image_size}")
    documents = {
        "config.json": hugging_face_config(config, dtype),
        "preprocessor_config.json": preprocess.to_hugging_face(),
        "open_clip_config.json": {"model_cfg": config.to_open_clip(), "preprocess_cfg": preprocess.to_open_clip()},
    }
    if epath.Path(folder).exists() and not (epath.Path(folder) / "open_clip_config.json").exists():
        raise FileExistsError(f"{folder} exists and is no earlier export: choose another folder")
    state = {key: value.astype(jnp.dtype(dtype)) for key, value in to_open_clip(params, config).items()}
    with atomic_folder(folder, overwrite=overwrite) as unfinished:
        for name, document in documents.items():
            (unfinished / name).write_text(json.dumps(document, indent=2) + "\n")
        _write_weights(unfinished / "open_clip_model.safetensors", state)
        _write_weights(unfinished / "model.safetensors", to_hugging_face(state, config))
        Tokenizer(config.text.context_length).save(unfinished)
        (unfinished / "README.md").write_text(model_card(params, dtype, figures or {}))


def model_card(params: Mapping[str, Any], dtype: str, figures: Mapping[str, float | str]) -> str:
    """The README.md of an exported model: what its weights are, how to load it, and the measured figures."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, TernaryTensor))
    total = sum(leaf.trits.size if isinstance(leaf, TernaryTensor) else leaf.size for leaf in leaves)
    ternary = sum(leaf.trits.size for leaf in leaves if isinstance(leaf, TernaryTensor))
    about = f"A CLIP model of {total:,} parameters, exported from tclip_jax as {dtype}."
    if ternary:
        about += (
            f" {ternary / total:.1%} of them are ternary (−1, 0 or +1 times a scale); here they are stored as the"
            " floats scale · trit, so these files are as large as those of a float model."
        )
    rows = "".join(f"| {name} | {value} |\n" for name, value in figures.items())
    table = f"\n| measured | |\n|---|---|\n{rows}" if rows else ""
    return _CARD.format(title="Ternary CLIP" if ternary else "CLIP", about=about, table=table)


def _write_weights(path: epath.Path, state: State) -> None:
    # transformers refuses files that do not say which library's tensors they hold.
    path.write_bytes(safetensors.numpy.save(state, {"format": "pt"}))
