"""The README.md of an exported model: what it is, how to load each of its formats, and its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from tclip_jax.interop.onnx_graph import Form
from tclip_jax.pages import dotted
from tclip_jax.ternary import QuantizedTensor, TernaryTensor, UniformTensor

_LIBRARIES = {"open_clip": "open_clip", "hf": "transformers"}  # format -> name of the library on the hub
# Start of a format's name, which is its tag on the hub -> its name in a sentence.
_NAMES = {
    "gguf": "GGUF",
    "onnx": "ONNX",
    "litert": "LiteRT",
    "stablehlo": "StableHLO",
    "torch": "packed PyTorch",
    "big_vision": "big_vision",
}

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
    "big_vision": """
In big_vision:

```python
from big_vision import utils

params = utils.load_params("FOLDER/big_vision.npz")
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
    "onnx": """
The ONNX files run without PyTorch and JAX. Those with q2, q4 or quantized in their names hold packed weights, for
onnxruntime 1.28 or newer:

```python
import onnxruntime

image = onnxruntime.InferenceSession("FOLDER/onnx/vision_model{suffix}.onnx")
text = onnxruntime.InferenceSession("FOLDER/onnx/text_model{suffix}.onnx")
(image_embeds,) = image.run(None, {{"pixel_values": pixels}})  # float32 (N, 3, H, W), normalised
(text_embeds,) = text.run(None, {{"input_ids": ids, "attention_mask": mask}})  # int64 (N, T)
```

Embeddings are not L2-normalised. The metadata of each file have the preprocessing and the factor of the similarities:
`image.get_modelmeta().custom_metadata_map`.
""",
    "litert": """
The LiteRT files run without PyTorch and JAX, with packed weights, for ai-edge-litert 1.4 or newer:

```python
from ai_edge_litert.interpreter import Interpreter

image = Interpreter("FOLDER/litert/image.tflite").get_signature_runner()
text = Interpreter("FOLDER/litert/text.tflite").get_signature_runner()
image_embeds = image(pixel_values=pixels)["image_embeds"]  # float32 (N, H, W, 3), normalised
text_embeds = text(input_ids=ids)["text_embeds"]  # int32 (N, context length)
```

N was chosen at export, by default 1. Embeddings are not L2-normalised. open_clip_config.json has the preprocessing.
""",
    "stablehlo": """
The folder `stablehlo` holds both towers as programs of jax.export, for CPUs, TPUs and CUDA, with weights of 2 bits:

```python
from load import load  # in the folder stablehlo; pip install jax flatbuffers safetensors

encode_image, encode_text = load()
```
""",
    "torch": """
The folder `torch` holds weights of 2 bits for PyTorch on CPUs, and the package that runs them; `pip install
FOLDER/torch` compiles its kernel:

```python
import tclip_torch

model = tclip_torch.load("FOLDER/torch")
image = model.encode_image(pixels)  # float32 (N, 3, H, W), normalised; embeddings of length 1
text = model.encode_text(ids)  # int64 (N, T)
```

`tclip_torch.replace_linears(model, "FOLDER/torch")` puts the weights into a model of open_clip or transformers.
""",
}
_TRANSFORMERS_JS = """
In a browser, with transformers.js:

```js
import {{ CLIPVisionModelWithProjection, CLIPTextModelWithProjection }} from "@huggingface/transformers";

const image = await CLIPVisionModelWithProjection.from_pretrained("FOLDER", {{ dtype: "{dtype}" }});
const text = await CLIPTextModelWithProjection.from_pretrained("FOLDER", {{ dtype: "{dtype}" }});
```
"""
_DEMO = """
`python -m http.server -d FOLDER` serves a page, index.html, that classifies and searches pictures in a browser.
"""


def model_card(
    params: Mapping[str, Any],
    dtype: str,
    figures: Mapping[str, Any],
    formats: Sequence[str],
    check: bool = False,
    provenance: Mapping[str, Any] = {},
    *,
    onnx: Form | None = None,
    transformers_js: bool = False,
    demo: bool = False,
) -> str:
    """Return the README.md of an exported model: its weights, origin, usage, check and figures.

    Args:
      params: parameters, of which only shapes are read.
      dtype: dtype of the weights for open_clip and transformers.
      figures: measured values by name.
      formats: the exported formats.
      check: whether the folder has a check script.
      provenance: the origin of the model.
      onnx: the form of the ONNX files that the usage shows; None is the default one.
      transformers_js: whether transformers.js loads the ONNX files.
      demo: whether the folder has a page for browsers.
    """
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    total = sum(math.prod(leaf.shape) for leaf in leaves)
    ternary, uniform = (
        sum(math.prod(leaf.shape) for leaf in leaves if isinstance(leaf, kind))
        for kind in (TernaryTensor, UniformTensor)
    )
    libraries = [name for name in _LIBRARIES if name in formats]
    tags = [tag for tag in _NAMES if any(name.startswith(tag) for name in formats)]
    kind = dtype if libraries else " and ".join(_NAMES[tag] for tag in tags)
    about = f"A CLIP model with {total:,} parameters, exported from tclip_jax as {kind}."
    if ternary:
        about += f" {ternary / total:.1%} of them are ternary (−1, 0 or +1 times a scale)."
    if uniform:
        about += f" {uniform / total:.1%} have 4 or 8 bits (integers times a scale)."
    if (ternary or uniform) and libraries:
        factors = " and ".join([*(["scale · trit"] if ternary else []), *(["scale · integer"] if uniform else [])])
        about += f" The safetensors files store them as floats, {factors}, and are as large as those of a float model."
    table = ""
    for title, entries in (("measured", figures), ("provenance", provenance)):
        rows = "".join(f"| {_cell(name)} | {_cell(value)} |\n" for name, value in dotted(entries))
        table += f"\n| {title} | |\n|---|---|\n{rows}" if rows else ""
    usage = "".join(text for name, text in _USAGE.items() if any(chosen.startswith(name) for chosen in formats))
    if "onnx" in tags:
        onnx = onnx or Form()
        usage = usage.format(suffix=onnx.suffix)
        usage += _TRANSFORMERS_JS.format(dtype=onnx.web_dtype) if transformers_js else ""
    usage += _DEMO if demo else ""
    names = [*(_LIBRARIES[name] for name in libraries), *tags]
    return _CARD.format(
        library=f"library_name: {names[0]}\n" if libraries else "",
        tags=", ".join(["clip", *(["ternary"] if ternary else []), *names]),
        title="Ternary CLIP" if ternary else "CLIP",
        about=about,
        usage=usage,
        check=_CHECK if check else "",
        table=table,
    )


def _cell(value: Any) -> str:
    """Return a value as a table cell on one line, floats with six digits."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", r"\|")
