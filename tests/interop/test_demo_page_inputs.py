"""The tokens and pixels that the page makes, in Chromium, beside those of Python."""

from __future__ import annotations

import base64
import pathlib
import random
from typing import Any

import ftfy
import numpy as np
import PIL
import pytest
from packaging.version import Version
from PIL import Image, ImageCms

from tclip_jax.data.images import Preprocess, decode
from tclip_jax.data.images import preprocess as our_pixels
from tclip_jax.data.tokenizer import Tokenizer
from tests.interop.browser import Open, Page, encoded, photo, png

pytestmark = pytest.mark.runtimes

# A profile that colour management would apply.
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


TEXT = (
    "a photo of the cat dog sleeping on wooden table near river 東京 タワー кошка собака γάτα قطة חתול "
    "naïve café Straße smörgåsbord it's they're we'll I'd don't O'Neil 3 42 1999 3.14 ½ ² ① Ⅷ 😀 "
    "👩\u200d👩\u200d👧\u200d👦 🏴\U000e0067\U000e0062\U000e0077\U000e006c\U000e0073\U000e007f 🇩🇪 ☕️ ... "
    "!!! ?! -- — “quoted” ‘single’ #tag @user https://example.org/a?b=c&d=e &amp; &lt;b&gt; &eacute; "
    "&NTILDE; &#39; &#x1F600; &amp;amp; &copy &notit; &hellip; ﬁsh oﬃce Ĳssel ＦＵＬＬ ｶﾀｶﾅ İstanbul ΑΣ "
    "ſt's é \xa0 \u2009 \u3000 \x09\x0a \u200b \ufeff \x07 \x1b[31m \x85 \x93hi\x94 "
    "supercalifragilisticexpialidocious <|endoftext|> <start_of_text> a_b x²y 한국어 ภาษาไทย हिन्दी"
)
WORDS = TEXT.split(" ")


def captions() -> list[str]:
    rng = random.Random(0)
    drawn = [" ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(500)]
    glued = ["".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(200)]
    letters = [
        "".join(chr(rng.choice([*range(32, 0x250), *range(0x2000, 0x2100)])) for _ in range(20)) for _ in range(200)
    ]
    special = [
        "",
        " ",
        "!",
        "a" * 2000,
        "a photo of a cat. " * 40,
        "<p>&rsquo;\n&rsquo;</p>",
        "\r\n a\rb\u2028c",
        "&#0;&#128;&#xD800;",
    ]
    return [*special, *WORDS, *drawn, *glued, *letters]


def is_mojibake(text: str) -> bool:
    """Whether ftfy decodes a text again, which the page does not."""
    return ftfy.fix_text(text) != ftfy.fix_text(text, fix_encoding=False)


@pytest.mark.parametrize("length", [16, 77])
def test_tokens(demo: pathlib.Path, open_page: Open, length: int) -> None:
    texts = [text for text in captions() if not is_mojibake(text)]
    assert len(texts) > 950
    found = open_page(demo, load=False).evaluate(
        """async ([texts, length]) => {
            const { makeTokenizer } = await import("./tokenizer.js");
            return texts.map(makeTokenizer(await (await fetch("tokenizer.json")).json(), length));
        }""",
        [texts, length],
    )
    padded = [[*ids, *[0] * (length - len(ids))] for ids in found]
    wrong = [
        text for text, ids, ours in zip(texts, padded, Tokenizer(length)(texts).tolist(), strict=True) if ids != ours
    ]
    assert not wrong, f"{len(wrong)} of {len(texts)}: {wrong[:5]}"


SIZES = (
    (8, 8),
    (32, 32),
    (33, 31),
    (1, 5),
    (64, 48),
    (48, 64),
    (225, 223),
    (300, 1000),
    (777, 401),
    (20, 400),
    (900, 200),
)
SETTINGS = (
    Preprocess(32),
    Preprocess(224),
    Preprocess(48, interpolation="bilinear"),
    Preprocess((30, 50)),
    Preprocess((50, 31), interpolation="bilinear"),
    Preprocess(64, resize_mode="longest"),
    Preprocess((40, 70), resize_mode="longest"),
    Preprocess((33, 64), resize_mode="squash"),
    Preprocess(64, resize_mode="squash", interpolation="bilinear"),
)


def browser_pixels(page: Page, files: list[bytes], settings: Preprocess) -> list[np.ndarray]:
    """The pixels that the page computes of files, before they are normalised."""
    found = page.evaluate(
        """async ([files, settings]) => {
            const { preprocess } = await import("./pixels.js");
            const results = [];
            for (const file of files) {
                const pixels = await preprocess(await (await fetch(`data:;base64,${file}`)).blob(), settings);
                results.push(btoa(pixels.reduce((text, value) => text + String.fromCharCode(value), "")));
            }
            return results;
        }""",
        [[base64.b64encode(file).decode() for file in files], settings.to_open_clip()],
    )
    return [np.frombuffer(base64.b64decode(text), np.uint8).reshape(*settings.size, 3) for text in found]


def largest_error(page: Page, files: list[bytes], settings: Preprocess) -> int:
    errors = [
        np.abs(theirs.astype(int) - our_pixels(decode(file), settings)).max()
        for file, theirs in zip(files, browser_pixels(page, files, settings), strict=True)
    ]
    return int(max(errors))


def grey(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0])


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = 6  # orientation: a quarter turn
    return exif


@pytest.mark.skipif(Version(PIL.__version__) < Version("13"), reason="Pillow before 13 always resizes rows first")
def test_pixels_of_sizes_and_settings(demo: pathlib.Path, open_page: Open) -> None:
    page = open_page(demo, load=False)
    files = [png(Image.fromarray(photo(*size))) for size in SIZES]
    for settings in SETTINGS:
        assert largest_error(page, files, settings) == 0, settings


def test_pixels_of_kinds_of_files(demo: pathlib.Path, open_page: Open) -> None:
    page, colour, alpha = open_page(demo, load=False), photo(70, 91), photo(70, 91, 4)
    alpha[:20, :, 3], alpha[20:40, :, 3] = 0, 255  # colours below full transparency
    palette = Image.fromarray(colour).quantize(50)
    deep = Image.fromarray(colour[..., 0].astype(np.uint16) * 257)
    files = {
        "grey": png(grey(colour)),
        "black and white": png(grey(colour).convert("1")),
        "RGBA": png(Image.fromarray(alpha)),
        "grey with alpha": png(Image.fromarray(alpha).convert("LA")),
        "palette": png(palette),
        "palette with a transparent colour": png(palette, transparency=3),
        "a transparent colour": png(Image.fromarray(colour), transparency=tuple(colour[0, 0].tolist())),
        "16 bit grey": png(deep),
        "orientation": png(Image.fromarray(colour), exif=rotated()),
        "gamma and profile": png(Image.fromarray(colour), icc_profile=PROFILE),
        "GIF": encoded(palette, "GIF"),
        "BMP": encoded(Image.fromarray(colour), "BMP"),
        "WebP": encoded(Image.fromarray(alpha), "WEBP", lossless=True, exact=True),
        "WebP with losses": encoded(Image.fromarray(colour), "WEBP", quality=80),
    }
    for settings in (SETTINGS[0], SETTINGS[5]):
        errors = {name: largest_error(page, [file], settings) for name, file in files.items()}
        # What is beside a picture of a palette has its first colour in Pillow, and is black in the page.
        framed = ("palette", "palette with a transparent colour", "GIF") if settings.resize_mode == "longest" else ()
        assert not {name: error for name, error in errors.items() if error and name not in framed}, settings


@pytest.mark.parametrize("subsampling", [0, 2])
def test_pixels_of_jpeg(demo: pathlib.Path, open_page: Open, subsampling: int) -> None:
    page = open_page(demo, load=False)
    options: list[dict[str, Any]] = [{}, {"progressive": True}, {"exif": rotated()}, {"icc_profile": PROFILE}]
    files = [
        encoded(Image.fromarray(photo(*size)), "JPEG", quality=85, subsampling=subsampling, **each)
        for size in SIZES
        for each in options
    ]
    files += [encoded(grey(photo(70, 91)), "JPEG")]
    assert largest_error(page, files, Preprocess(224)) <= 2
    assert largest_error(page, files, Preprocess(32)) <= 2


def test_normalised_pixels(demo: pathlib.Path, open_page: Open) -> None:
    """The input of the model, to the bit."""
    settings, pixels = Preprocess(16), np.arange(768, dtype=np.uint8).reshape(16, 16, 3)
    found = open_page(demo, load=False).evaluate(
        """async ([pixels, settings]) => {
            const { normalize } = await import("./pixels.js");
            return [...normalize(Uint8Array.from(pixels), settings)];
        }""",
        [pixels.ravel().tolist(), settings.to_open_clip()],
    )
    expected = np.moveaxis(settings(pixels)[0], -1, 0).ravel()
    np.testing.assert_array_equal(np.array(found, np.float32), expected)
