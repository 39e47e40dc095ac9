"""Tokens and pixels as we make them and as open_clip and transformers do."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from etils import epath
from PIL import Image

from tclip_jax.artifacts.model import Model
from tclip_jax.data.images import Preprocess, normalize, preprocess
from tclip_jax.data.tokenizer import Tokenizer, clean
from tclip_jax.numerics.report import Report
from tclip_jax.numerics.samples import sample_images, sample_texts
from tclip_jax.numerics.torch_side import library_inputs
from tclip_jax.storage import is_local

# Normalised pixels are floats: this is a few roundings, and 1/10,000 of one step of a pixel's 255.
PIXEL_TOLERANCE = 1e-6


def plain(text: str) -> bool:
    """Whether transformers reads a text as open_clip does.

    It repairs neither mojibake nor HTML, its lower case has no final sigma, and "'ſ" is no "'s" to it.
    """
    unrepaired = " ".join(unicodedata.normalize("NFC", text).split()).lower()
    return clean(text) == unrepaired and not set(text) & set("Σſ")


def plain_image(image: Image.Image) -> Image.Image:
    """Its upper left square in RGB: transformers converts before it resizes, and rounds the place of a crop otherwise.

    What Pillow remembers of a transparent colour, which transformers would use, is dropped.
    """
    side = min(image.size)
    return Image.fromarray(np.asarray(image.convert("RGB"))[:side, :side])


@dataclasses.dataclass(frozen=True)
class InputDifference:
    """How many of the inputs that were compared differ.

    Attributes:
      name: library and kind, as 'open_clip tokens'.
      compared: number of inputs.
      differ: those that are not the same.
      max_abs: max |Δ| of ids or normalised pixels.
      first: the first input that differs, in words, or "".
    """

    name: str
    compared: int
    differ: int
    max_abs: float
    first: str

    def over(self, budget: float) -> bool:
        """Whether any differs; inputs have no budget."""
        return self.differ > budget


def compare_tokens(
    name: str, ours: npt.NDArray[np.int32], theirs: npt.NDArray[np.int32], texts: Sequence[str]
) -> InputDifference:
    """Compares ids (N, T) of the same texts."""
    wrong = np.flatnonzero((ours != theirs).any(axis=-1))
    first = f"{texts[wrong[0]]!r:.60}" if len(wrong) else ""
    return InputDifference(name, len(texts), len(wrong), float(np.abs(ours - theirs).max(initial=0)), first)


def compare_pixels(
    name: str,
    ours: Sequence[npt.NDArray[np.float32]],
    theirs: Sequence[npt.NDArray[np.float32]],
    images: Sequence[Image.Image],
) -> InputDifference:
    """Compares normalised pixels (H, W, 3) of the same images."""
    errors = [
        float(np.abs(a - b).max()) if a.shape == b.shape else float("inf") for a, b in zip(ours, theirs, strict=True)
    ]
    wrong = [i for i, error in enumerate(errors) if error > PIXEL_TOLERANCE]
    first = f"image {wrong[0]}: {images[wrong[0]].mode} {images[wrong[0]].size}" if wrong else ""
    return InputDifference(name, len(errors), len(wrong), max(errors, default=0.0), first)


def inputs_report(model: Model, path: epath.PathLike, count: int = 50) -> Report:
    """Compares sample texts and images of a model with open_clip and, if a local folder has its files, transformers.

    Images so thin that nobody can resize them for this model are left out.
    """
    length, p = model.config.text.context_length, model.preprocess
    texts, images = sample_texts(count), [image for image in sample_images(count) if _can_be_resized(image, p)]
    rows = _compare("open_clip", p, length, texts, images, None)
    files = ("tokenizer.json", "preprocessor_config.json")
    if is_local(epath.Path(path)) and all((epath.Path(path) / name).exists() for name in files):
        texts, images = list(filter(plain, texts)), list(map(plain_image, images))
        rows += _compare("transformers", p, length, texts, images, path)
    verdict = [f"{row.name}: {row.compared} compared, {row.differ} differ" for row in rows]
    return Report(f"inputs of {path}", {}, {"inputs": rows}, 0.0, tuple(verdict), not any(row.differ for row in rows))


def _can_be_resized(image: Image.Image, p: Preprocess) -> bool:
    try:
        preprocess(image, p)
    except ValueError:
        return False
    return True


def _compare(
    library: str,
    p: Preprocess,
    length: int,
    texts: Sequence[str],
    images: Sequence[Image.Image],
    folder: epath.PathLike | None,
) -> list[InputDifference]:
    tokens, pixels = library_inputs(p, length, texts, images, folder)
    ours = [normalize(preprocess(image, p), p.mean, p.std) for image in images]
    return [
        compare_tokens(f"{library} tokens", Tokenizer(length)(texts), tokens, texts),
        compare_pixels(f"{library} pixels", ours, pixels, images),
    ]
