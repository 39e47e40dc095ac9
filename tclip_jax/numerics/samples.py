"""Texts and images to compare models on: every script, length, size and mode, and always the same."""

from __future__ import annotations

import io
import unicodedata

import numpy as np
import numpy.typing as npt
from PIL import Image

from tclip_jax.artifacts.model import Model
from tclip_jax.data.images import normalize, preprocess
from tclip_jax.data.tokenizer import VOCAB_SIZE, Tokenizer

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
    """Captions of every script and length, with mojibake, HTML, emoji and control characters; always the same."""
    rng = np.random.default_rng(0)
    texts, words = list(_PHRASES[:count]), " ".join(_PHRASES).split()
    while len(texts) < count:
        picked = rng.choice(words, rng.integers(1, 30))
        letters = [chr(point) for point in rng.integers(0x20, 0x2FFF, rng.integers(0, 8))]
        texts.append(" ".join([*picked, "".join(c for c in letters if unicodedata.category(c) != "Cn")]))
    return texts


def sample_images(count: int) -> list[Image.Image]:
    """Images of odd sizes and modes, sides of 1 pixel and turned EXIF among them; always the same."""
    rng = np.random.default_rng(0)
    images = []
    for i in range(count):
        width, height = (int(side) for side in rng.integers(2, 500, 2))
        shapes = ((width, width), (width, height), (height, width), (1, height % 50 + 1), (width, height), (width, 1))
        images.append(_image(_MODES[i % len(_MODES)], *shapes[i % len(shapes)], rng))
    return images


def _image(mode: str, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Blurred noise, which has edges and flat parts, in a Pillow mode."""
    small = Image.frombytes("RGB", (9, 7), rng.bytes(9 * 7 * 3))
    image = small.resize((width, height), Image.Resampling.BICUBIC)
    if mode == "EXIF":
        exif, buffer = Image.Exif(), io.BytesIO()
        exif[0x0112] = 6  # turned by 90 degrees
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
    """Normalised pixels and tokens of as many samples for a model; half of the texts fill the whole context.

    Short inputs would hide errors in late positions.

    Raises:
      ValueError: a count below 1, or a model of another vocabulary than CLIP's.
    """
    if count < 1:
        raise ValueError(f"a batch of {count}: it must be 1 or more")
    if model.config.text.vocab_size != VOCAB_SIZE:
        raise ValueError(f"vocab_size is {model.config.text.vocab_size}: sample texts need CLIP's {VOCAB_SIZE}")
    images = [image for image in sample_images(2 * count) if min(image.size) > 1]
    pixels = np.stack([preprocess(image, model.preprocess) for image in images[:count]])
    texts = [phrase if i % 2 else _PHRASES[-1] + phrase for i, phrase in enumerate(sample_texts(count))]
    tokens = Tokenizer(model.config.text.context_length)(texts)
    return normalize(pixels, model.preprocess.mean, model.preprocess.std), tokens
