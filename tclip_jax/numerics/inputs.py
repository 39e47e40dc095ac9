"""Compare preprocessing and tokens with open_clip and transformers on generated texts and images."""

from __future__ import annotations

import dataclasses
import io
import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from etils import epath
from PIL import Image

from tclip_jax.data.file_tokenizer import FileTokenizer
from tclip_jax.data.images import Preprocess, normalize, preprocess
from tclip_jax.data.tokenizer import VOCAB_SIZE, TextTokenizer, clean
from tclip_jax.inference.model import Model
from tclip_jax.interop.metadata import HUGGING_FACE, OPEN_CLIP
from tclip_jax.interop.tokenizer_files import TOKENIZER_CONFIG
from tclip_jax.numerics.report import Report
from tclip_jax.numerics.torch_side import library_inputs, library_pixels, library_texts
from tclip_jax.storage import is_local

_PHRASES = (
    "a photo of a cat",
    "A Photo\tof  TWO dogs \n",
    "don't we'll I'D they've o'clock rock 'n' roll",
    "in 1999, 3.14 x 10^-2 = №5 ½ ²",
    "naïve café, Straße, ÅNGSTRÖM, İstanbul, 'ſ",
    "日本語の写真 한국어 العربية हिन्दी ไทย",
    "family 👨‍👩‍👧‍👦 flag 🇫🇷 thumbs 👍🏽 ❤️",
    "e\u0301 combining, zero\u200bwidth, no\u00a0break, soft\u00adhyphen",
    "!!! ... --- <b>bold</b> @user #tag example.org/?q=1&r=2 </w> Ġ",
    "fish &amp; chips, &amp;amp; more, 5 &lt; 6, &#128512; &eacute; &bogus;",
    "âœ” schÃ¶n, itâ€™s “quoted” ‘text’…, ﬁne ligature",
    "control\x00\x07 characters\x1b[31m, ＦＵＬＬ ｗｉｄｔｈ",
    "ΟΔΟΣ ΣΑΣ, final sigma",
    "",
    "x" * 300,
    "one two three four five six seven eight nine ten " * 12,
)
_MODES = ("RGB", "RGB", "L", "P", "RGBA", "LA", "P+alpha", "1", "CMYK", "I;16", "EXIF")


def sample_texts(count: int) -> list[str]:
    """Return `count` fixed captions of many scripts and lengths, with mojibake, HTML, emoji and control characters."""
    rng = np.random.default_rng(0)
    texts, words = list(_PHRASES[:count]), " ".join(_PHRASES).split()
    while len(texts) < count:
        picked = rng.choice(words, rng.integers(1, 30))
        letters = [chr(point) for point in rng.integers(0x20, 0x2FFF, rng.integers(0, 8))]
        texts.append(" ".join([*picked, "".join(c for c in letters if unicodedata.category(c) != "Cn")]))
    return texts


def sample_images(count: int) -> list[Image.Image]:
    """Return `count` fixed images of many sizes and modes, with sides of 1 pixel and rotated EXIF among them."""
    rng = np.random.default_rng(0)
    images = []
    for i in range(count):
        width, height = (int(side) for side in rng.integers(2, 500, 2))
        shapes = ((width, width), (width, height), (height, width), (1, height % 50 + 1), (width, height), (width, 1))
        images.append(_image(_MODES[i % len(_MODES)], *shapes[i % len(shapes)], rng))
    return images


def _image(mode: str, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Return blurred noise, which has edges and flat areas, in a Pillow mode."""
    small = Image.frombytes("RGB", (9, 7), rng.bytes(9 * 7 * 3))
    image = small.resize((width, height), Image.Resampling.BICUBIC)
    if mode == "EXIF":
        exif, buffer = Image.Exif(), io.BytesIO()
        exif[0x0112] = 6  # rotated by 90 degrees
        image.save(buffer, "JPEG", exif=exif)
        return Image.open(buffer)
    if mode == "I;16":
        return Image.frombytes("I;16", (width, height), rng.bytes(2 * width * height))
    if mode in ("LA", "RGBA"):
        image.putalpha(image.getchannel(0))
        return image.convert(mode)
    if mode == "P+alpha":
        image = image.quantize(16)
        image.info["transparency"] = 3
        return image
    return image.convert(mode)


def sample_batch(model: Model, count: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Return normalised pixels (count, H, W, 3) and token ids (count, T) of fixed samples for a model.

    Half of the texts fill the whole context, because short texts would hide errors at late positions.

    Raises:
      ValueError: `count` is below 1, or the model's tokenizer is neither CLIP's nor stored with it.
    """
    if count < 1:
        raise ValueError(f"a batch of {count}: it must be 1 or more")
    if not model.config.text.hf_tokenizer_name and model.config.text.vocab_size != VOCAB_SIZE:
        raise ValueError(f"vocab_size is {model.config.text.vocab_size}: sample texts need CLIP's {VOCAB_SIZE}")
    images = [image for image in sample_images(2 * count) if min(image.size) > 1]
    pixels = np.stack([preprocess(image, model.preprocess) for image in images[:count]])
    texts = [phrase if i % 2 else _PHRASES[-1] + phrase for i, phrase in enumerate(sample_texts(count))]
    return normalize(pixels, model.preprocess.mean, model.preprocess.std), model.tokenize(texts)


# In normalised pixels: a few float32 roundings, and about 1/10,000 of one of the 255 steps of a pixel.
PIXEL_TOLERANCE = 1e-6


def same_in_transformers(text: str) -> bool:
    """Return whether transformers tokenizes a text as open_clip does.

    transformers repairs neither mojibake nor HTML, lowercases "Σ" without the final form, and splits "'ſ" otherwise.
    """
    unrepaired = " ".join(unicodedata.normalize("NFC", text).split()).lower()
    return clean(text) == unrepaired and not set(text) & set("Σſ")


def square_rgb(image: Image.Image) -> Image.Image:
    """Return the upper left square in RGB, which transformers preprocesses as open_clip does.

    On other images transformers converts the mode before it resizes, and rounds the crop's position differently. The
    copy also drops a transparent colour that Pillow stores and transformers would use.
    """
    side = min(image.size)
    return Image.fromarray(np.asarray(image.convert("RGB"))[:side, :side])


@dataclasses.dataclass(frozen=True)
class InputDifference:
    """The result of comparing one kind of input with one library.

    Attributes:
      name: library and kind, for example 'open_clip tokens'.
      compared: number of inputs compared.
      differ: number of inputs that differ.
      max_abs: max |Δ| over token ids or normalised pixels; 1 if cleaned texts differ.
      first: description of the first input that differs, or "".
    """

    name: str
    compared: int
    differ: int
    max_abs: float
    first: str

    def over(self, budget: float) -> bool:
        """Return whether more than `budget` inputs differ; reports use 0."""
        return self.differ > budget


def compare_tokens(
    name: str, ours: npt.NDArray[np.int32], theirs: npt.NDArray[np.int32], texts: Sequence[str]
) -> InputDifference:
    """Compare token ids (N, T) of the same texts."""
    mistakes = np.flatnonzero((ours != theirs).any(axis=-1))
    first = f"{texts[mistakes[0]]!r:.60}" if len(mistakes) else ""
    return InputDifference(name, len(texts), len(mistakes), float(np.abs(ours - theirs).max(initial=0)), first)


def compare_pixels(
    name: str,
    ours: Sequence[npt.NDArray[np.float32]],
    theirs: Sequence[npt.NDArray[np.float32]],
    images: Sequence[Image.Image],
) -> InputDifference:
    """Compare normalised pixels, arrays (H, W, 3), of the same images."""
    errors = [
        float(np.abs(a - b).max()) if a.shape == b.shape else float("inf") for a, b in zip(ours, theirs, strict=True)
    ]
    mistakes = [i for i, error in enumerate(errors) if error > PIXEL_TOLERANCE]
    first = f"image {mistakes[0]}: {images[mistakes[0]].mode} {images[mistakes[0]].size}" if mistakes else ""
    return InputDifference(name, len(errors), len(mistakes), max(errors, default=0.0), first)


def inputs_report(model: Model, path: epath.PathLike, count: int = 50) -> Report:
    """Compare a model's tokens and pixels of generated samples with open_clip and, if possible, transformers.

    If the model's tokenizer is not CLIP's own, texts are compared before that as they are cleaned, and with a library
    only if the folder is local and has its metadata. The verdict names the first stage that differs.

    Args:
      model: the model whose preprocessing and tokenizer are tested.
      path: its folder; transformers is compared if the folder is local and has the files that transformers loads.
      count: number of texts and of images. Images too thin to resize for this model are skipped.

    Raises:
      ValueError: the model's tokenizer is not CLIP's own, and is not stored with it.
    """
    tokenizer, p = model.text_tokenizer, model.preprocess
    texts, images = sample_texts(count), [image for image in sample_images(count) if _can_be_resized(image, p)]
    folder, squares, local = epath.Path(path), list(map(square_rgb, images)), is_local(epath.Path(path))
    has_pixels = local and (folder / "preprocessor_config.json").exists()
    stages: list[str] = []
    if isinstance(tokenizer, FileTokenizer):
        rows = [_compare_pixels("open_clip", p, images, None)]
        rows += [_compare_pixels("transformers", p, squares, folder)] if has_pixels else []
        for library, name in (("open_clip", OPEN_CLIP), ("transformers", HUGGING_FACE)):
            if local and (folder / name).exists() and (folder / TOKENIZER_CONFIG).exists():
                compared = _compare_texts(tokenizer, library, folder, texts)
                rows += compared
                stages += [f"texts first differ from {row.name}" for row in compared if row.differ][:1]
    else:
        rows = _compare_library("open_clip", tokenizer, p, texts, images, None)
        if has_pixels and (folder / "tokenizer.json").exists():
            texts = list(filter(same_in_transformers, texts))
            rows += _compare_library("transformers", tokenizer, p, texts, squares, folder)
    equal = sum(not row.differ for row in rows)
    verdict = [f"{equal} of {len(rows)} kinds of input are equal", *stages]
    for row in rows:
        verdict.append(f"{row.name}: {row.compared} compared, {row.differ} differ")
        verdict[-1] += f"; the first: {row.first}" if row.differ else ""
    return Report(f"inputs of {path}", {}, {"inputs": rows}, 0.0, tuple(verdict), equal == len(rows))


def _can_be_resized(image: Image.Image, p: Preprocess) -> bool:
    try:
        preprocess(image, p)
    except ValueError:
        return False
    return True


def _compare_library(
    library: str,
    tokenizer: TextTokenizer,
    p: Preprocess,
    texts: Sequence[str],
    images: Sequence[Image.Image],
    folder: epath.PathLike | None,
) -> list[InputDifference]:
    tokens, pixels = library_inputs(p, tokenizer.context_length, texts, images, folder)
    ours = [normalize(preprocess(image, p), p.mean, p.std) for image in images]
    return [
        compare_tokens(f"{library} tokens", tokenizer(texts), tokens, texts),
        compare_pixels(f"{library} pixels", ours, pixels, images),
    ]


def _compare_pixels(
    library: str, p: Preprocess, images: Sequence[Image.Image], folder: epath.PathLike | None
) -> InputDifference:
    ours = [normalize(preprocess(image, p), p.mean, p.std) for image in images]
    return compare_pixels(f"{library} pixels", ours, library_pixels(p, images, folder), images)


def _compare_texts(
    tokenizer: FileTokenizer, library: str, folder: epath.Path, texts: Sequence[str]
) -> list[InputDifference]:
    """Compare texts with a library after cleaning, and as tokens."""
    cleaned, tokens = library_texts(library, folder, tokenizer.context_length, texts)
    ours = [tokenizer.cleaned(text) for text in texts]
    differ = [i for i, (mine, theirs) in enumerate(zip(ours, cleaned, strict=True)) if mine != theirs]
    first = f"{texts[differ[0]]!r:.60} is {ours[differ[0]]!r:.60}, not {cleaned[differ[0]]!r:.60}" if differ else ""
    return [
        InputDifference(f"{library} cleaning", len(texts), len(differ), float(bool(differ)), first),
        compare_tokens(f"{library} tokens", tokenizer(texts), tokens, texts),
    ]
