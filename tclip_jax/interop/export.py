"""Export a model as a folder of several formats, which other libraries and runtimes load."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from tclip_jax.data.file_tokenizer import FileTokenizer
from tclip_jax.data.images import Preprocess
from tclip_jax.data.tokenizer import Tokenizer
from tclip_jax.interop.demo_page import check_demo, write_demo
from tclip_jax.interop.examples import write_check
from tclip_jax.interop.formats import ACCURACY_LEVELS, DTYPES, FORMATS, ONNX_FOLDER, Job
from tclip_jax.interop.hugging_face_config import hugging_face_config
from tclip_jax.interop.model_card import model_card
from tclip_jax.interop.onnx import fewest_bits
from tclip_jax.interop.onnx_graph import Form
from tclip_jax.interop.open_clip import is_timm
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.timm_cfg import to_timm
from tclip_jax.storage import atomic_folder


class Exported(NamedTuple):
    """What an export wrote.

    Attributes:
      files: name, bytes, and what runs it, for each file with weights.
      notes: the results of verifications, a line each.
    """

    files: tuple[tuple[str, int, str], ...]
    notes: tuple[str, ...]


def export_model(
    folder: epath.PathLike,
    *,
    config: CLIPConfig,
    preprocess: Preprocess,
    params: Mapping[str, Any],
    tokenizer: FileTokenizer | None = None,
    formats: Sequence[str] = ("open_clip", "hf"),
    dtype: str = "float32",
    accuracy_level: int = 4,
    batch: int = 1,
    figures: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    check: bool = False,
    demo: bool = False,
    demo_runtime: epath.PathLike | None = None,
    overwrite: bool = False,
) -> Exported:
    """Export a model as a folder that open_clip ("local-dir:…"), transformers and runtimes load.

    The folder is written atomically. In every format it has the tokenizer, open_clip_config.json and a model card.
    Weights are converted and written tensor by tensor.

    Args:
      folder: the folder, local or remote (gs://).
      config: the model.
      preprocess: the preprocessing of its images.
      params: parameter tree with `QuantizedTensor` leaves, which open_clip and transformers get as floats. Other leaves
        may be lazy.
      tokenizer: what tokenizes texts, of a model whose tokenizer is not CLIP's own.
      formats: any of `FORMATS`. A GGUF file is named after the folder, as in release-tq1_0.gguf. Files other than
        those of open_clip and transformers are verified after writing.
      dtype: dtype of the weights that open_clip, transformers and ONNX store as floats, one of `DTYPES`; for ONNX not
        bfloat16. Ternary weights with scales of 8 significant bits are exact in all of them, those with 4 and 8 bits in
        float32.
      accuracy_level: of ONNX Runtime's products with packed weights. 4 rounds activations to int8; 1 is exact and slow.
      batch: number of images or texts that LiteRT files take; it is fixed in them.
      figures: measured values for the model card, by name; nested values get dotted names.
      provenance: the origin of the model, for the model card, in the same form.
      check: run the model on example inputs, and write check.py, which compares the libraries' embeddings with them.
      demo: add a page for browsers, which needs the format "onnx"; see `write_demo`.
      demo_runtime: where the page's copy of onnxruntime-web comes from; None: it is loaded from the network.
      overwrite: replace the folder if it is an earlier export.

    Raises:
      ValueError: a format cannot express the model, its preprocessing, groups or scales; the parameters or the image
        size do not match `config`; a format or dtype is unknown; weights are not finite in `dtype`; a package is not
        installed or too old; or the embeddings of ONNX Runtime, LiteRT or packed PyTorch differ from those of JAX.
      FileExistsError: the folder exists.
    """
    _check_options(formats, dtype, accuracy_level, batch)
    if preprocess.size != config.vision.image_size:
        raise ValueError(f"preprocessing gives images of {preprocess.size}: the model takes {config.vision.image_size}")
    if demo and "onnx" not in formats:
        raise ValueError(f"the page runs the format onnx, and the formats are {', '.join(formats)}: add onnx")
    if demo:
        check_demo(config, demo_runtime)
    documents, transformers_js = _documents(config, preprocess, params, formats, dtype)
    if tokenizer and config.text.hf_tokenizer_name:
        documents["open_clip_config.json"]["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = tokenizer.open_clip_kwargs
    folder = epath.Path(folder)
    if folder.exists() and not (folder / "open_clip_config.json").exists():
        raise FileExistsError(f"{folder} exists and is not an earlier export: choose another folder")
    files: list[tuple[str, int, str]] = []
    notes: list[str] = []
    with atomic_folder(folder, overwrite=overwrite) as unfinished:
        job = Job(unfinished, folder.name, config, preprocess, params, dtype, accuracy_level, batch)
        # Those of open_clip and transformers last: the others are likelier to fail, for groups, scales or packages.
        for name in sorted(set(formats), key=list(FORMATS).index, reverse=True):
            written, lines = FORMATS[name].write(job)
            files += [(file, (unfinished / file).stat().length, FORMATS[name].runs) for file in written]
            notes += lines
        for name, document in documents.items():
            (unfinished / name).write_text(json.dumps(document, indent=2) + "\n")
        if check:
            write_check(unfinished, job.examples(dtype=dtype, floats=True))
        if not config.text.hf_tokenizer_name:
            Tokenizer(config.text.context_length).save(unfinished)
        elif tokenizer:
            tokenizer.save(unfinished)
            notes += _tokenizer_notes(tokenizer)
        else:
            notes.append(f"no tokenizer is written: copy that of {config.text.hf_tokenizer_name} into the folder")
        if demo:
            data = (provenance or {}).get("data")
            digits = isinstance(data, Mapping) and data.get("source") == "digits"
            notes.append(write_demo(job, digits=digits, runtime=demo_runtime))
        card = model_card(
            params,
            dtype,
            figures or {},
            formats,
            check,
            provenance or {},
            onnx=_smallest_onnx(formats, dtype, params),
            transformers_js=transformers_js,
            demo=demo,
        )
        (unfinished / "README.md").write_text(card)
    return Exported(tuple(files), tuple(notes))


def _tokenizer_notes(tokenizer: FileTokenizer) -> list[str]:
    """Return a line about the texts that one of both libraries tokenizes in another way."""
    if tokenizer.clean:
        return ["transformers does not repair mojibake and HTML entities in texts, as open_clip and the model do"]
    return ["open_clip repairs mojibake, HTML entities and spaces in texts, which transformers and the model do not"]


def _check_options(formats: Sequence[str], dtype: str, accuracy_level: int, batch: int) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if accuracy_level not in ACCURACY_LEVELS:
        raise ValueError(f"accuracy_level {accuracy_level!r} is not one of {', '.join(map(str, ACCURACY_LEVELS))}")
    if batch < 1:
        raise ValueError(f"batch {batch} is below 1")
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"format {unknown[0]!r} is not one of {', '.join(FORMATS)}")
    for name in formats:
        if FORMATS[name].dtypes and dtype not in FORMATS[name].dtypes:
            raise ValueError(f"{name} has no dtype {dtype}: choose {' or '.join(FORMATS[name].dtypes)}")


def _documents(
    config: CLIPConfig, preprocess: Preprocess, params: Mapping[str, Any], formats: Sequence[str], dtype: str
) -> tuple[dict[str, Any], bool]:
    """Return the JSON files of an export by name, and whether transformers.js can load its ONNX files."""
    if "open_clip" in formats and is_timm(config) and to_timm(config.vision) is None:
        raise ValueError(
            f"vision_cfg.width is {config.vision.width}: open_clip builds SigLIP's image towers by their names in timm,"
            " and none has this shape: hf has any"
        )
    documents: dict[str, Any] = {
        "open_clip_config.json": {"model_cfg": config.to_open_clip(), "preprocess_cfg": preprocess.to_open_clip()}
    }
    onnx = [name for name in formats if name.startswith(ONNX_FOLDER)]
    if not onnx and "hf" not in formats:
        return documents, False
    try:
        described = {
            "config.json": hugging_face_config(config, dtype),
            "preprocessor_config.json": preprocess.to_hugging_face(),
        }
    except ValueError:
        if "hf" in formats:
            raise
        return documents, False  # onnxruntime runs what transformers.js cannot express
    if onnx:
        described["config.json"]["transformers.js_config"] = {"dtype": _smallest_onnx(formats, dtype, params).web_dtype}
    return documents | described, bool(onnx)


def _smallest_onnx(formats: Sequence[str], dtype: str, params: Mapping[str, Any]) -> Form:
    """Return the form of the smallest ONNX files."""
    whole = Form(False, "float16" if "onnx-fp16" in formats else "float32")
    return Form(True, dtype, bits=fewest_bits(params) or 2) if "onnx" in formats else whole
