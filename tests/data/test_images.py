"""Images to pixels: identical to open_clip's transform."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tclip_jax.data import images
from tclip_jax.data.images import Preprocess

MODES = ("RGB", "RGBA", "L", "LA", "P", "P+colour", "P+bytes", "1", "CMYK", "I;16", "I", "F")
SIZES = [(1, 1), (1, 40), (40, 1), (2, 3), (31, 33), (32, 32), (47, 101), (101, 47), (64, 65), (35, 36)]


def noise(mode: str, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    if mode.startswith("P"):
        image = Image.frombytes("P", (width, height), rng.bytes(width * height))
        image.putpalette(rng.bytes(768))
        transparency = {"P": None, "P+colour": 3, "P+bytes": rng.bytes(256)}[mode]
        image.info |= {} if transparency is None else {"transparency": transparency}
        return image
    if mode == "I;16":
        return Image.frombytes("I;16", (width, height), rng.bytes(2 * width * height))
    if mode in ("I", "F"):
        return Image.fromarray(rng.uniform(-100, 400, (height, width)).astype(np.int32 if mode == "I" else np.float32))
    if mode == "1":
        return noise("L", width, height).convert("1")
    return Image.frombytes(mode, (width, height), rng.bytes(width * height * len(Image.new(mode, (1, 1)).getbands())))


def encoded(image: Image.Image, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [32, 33, (24, 32), (41, 33)])
def test_pixels_equal_open_clip(size: int | tuple[int, int], interpolation: str, resize_mode: str) -> None:
    transform = pytest.importorskip("open_clip.transform")
    steps = transform.image_transform(size, False, interpolation=interpolation, resize_mode=resize_mode).transforms
    for mode in MODES:
        for width, height in SIZES:
            expected = image = noise(mode, width, height)
            for step in steps[:-2]:  # all but ToTensor and Normalize
                expected = step(expected)
            pixels = images.preprocess(image, Preprocess(size, interpolation=interpolation, resize_mode=resize_mode))
            np.testing.assert_array_equal(pixels, np.asarray(expected), f"{mode} {width}x{height}")


@pytest.mark.torch
@settings(deadline=None, max_examples=100)
@given(width=st.integers(1, 200), height=st.integers(1, 200), size=st.integers(1, 70))
def test_normalized_pixels_of_any_size_equal_open_clip(width: int, height: int, size: int) -> None:
    transform = pytest.importorskip("open_clip.transform")
    image, p = noise("RGB", width, height), Preprocess(size)
    expected = transform.image_transform(size, False)(image).numpy().transpose(1, 2, 0)
    np.testing.assert_array_equal(images.normalize(images.preprocess(image, p), p.mean, p.std), expected)


def test_an_image_of_the_right_size_is_not_changed() -> None:
    image = noise("RGB", 20, 12)
    pixels = images.preprocess(image, Preprocess((12, 20)))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.asarray(image))


def test_longest_pads_with_zeros() -> None:
    pixels = images.preprocess(Image.new("RGB", (4, 7), (9, 9, 9)), Preprocess(7, resize_mode="longest"))
    np.testing.assert_array_equal(np.flatnonzero(pixels[0, :, 0]), [1, 2, 3, 4])


@pytest.mark.parametrize(("size", "resize_mode"), [((90_000_000, 1), "shortest"), ((1000, 1), "longest")])
def test_too_thin_images_are_refused(size: tuple[int, int], resize_mode: str) -> None:
    image = Image.new("1", size)
    with pytest.raises(ValueError, match=f"an image of {size[0]}x1 cannot be resized to"):
        images.preprocess(image, Preprocess(8, resize_mode=resize_mode))


WRITTEN = {
    **dict.fromkeys(["PNG", "GIF", "TIFF"], ("RGB", "L", "P", "P+colour", "P+bytes", "1")),
    **dict.fromkeys(["JPEG", "BMP", "WEBP", "PPM", "PCX", "SGI", "TGA", "ICO", "DDS", "QOI"], ("RGB",)),
    **dict.fromkeys(["JPEG2000", "AVIF", "ICNS"], ("RGB", "RGBA")),
    **dict.fromkeys(["XBM", "MSP"], ("1",)),
}
CASES = [*((kind, mode) for kind, modes in WRITTEN.items() for mode in modes), ("JPEG", "CMYK"), ("TIFF", "CMYK")]


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize(("file_format", "mode"), [*CASES, ("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA")])
def test_decode_reads_as_pillow_does(file_format: str, mode: str) -> None:
    data = encoded(noise(mode, 32, 32), file_format)
    expected = Image.open(io.BytesIO(data))
    expected.load()
    decoded = images.decode(data)
    assert decoded.mode == expected.mode and decoded.format == file_format
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(expected))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = decoded.convert("RGB")
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "TIFF", "WEBP", "AVIF", "MPO"])
def test_an_animation_gives_its_first_frame(file_format: str) -> None:
    buffer, (first, second) = io.BytesIO(), (noise("RGB", 32, 32), noise("RGB", 33, 32).crop((0, 0, 32, 32)))
    first.save(buffer, file_format, save_all=True, append_images=[second])
    expected = Image.open(io.BytesIO(buffer.getvalue()))
    assert expected.n_frames == 2  # type: ignore[attr-defined]
    expected.seek(0)
    decoded = images.decode(buffer.getvalue()).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(expected.convert("RGB")))


def test_suffixes_are_those_of_the_supported_formats() -> None:
    torchvision = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
    assert torchvision | {".gif", ".avif", ".jp2", ".mpo", ".tga", ".ico", ".psd"} <= images.SUFFIXES
    assert (
        not {".eps", ".ps", ".pdf", ".wmf", ".mpg", ".iim", ".h5", ".grib", ".bufr", ".txt", ".json"} & images.SUFFIXES
    )
    assert all(name in Image.OPEN for name in images._FORMATS)


def test_a_pgm_of_16_bits_keeps_its_upper_8() -> None:
    values = np.array([[0, 255, 256, 65535, 30000]], np.uint16)
    image = images.decode(b"P5 5 1 65535\n" + values.byteswap().tobytes())
    np.testing.assert_array_equal(np.asarray(image), values >> 8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"<html>not found</html>", "no supported format begins with b'<html>not fo'"),
        (b"\x1b[31m", r"no supported format begins with b'\x1b[31m'"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "the format EPS is not supported"),
        (b"\xd7\xcd\xc6\x9a" + bytes(40), "the format WMF is not supported"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "the format HDF5 is not supported"),
    ],
)
def test_the_error_says_why_data_is_not_an_image(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"not a usable image ({len(data)} bytes): {reason}")):
        images.decode(data)


def test_grey_of_16_bits_keeps_its_upper_8_and_its_format() -> None:
    grey = noise("I;16", 3, 2)
    image = images.decode(encoded(grey))
    assert (image.mode, image.format) == ("L", "PNG")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(grey) >> 8)


def test_decode_ignores_exif_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    buffer = io.BytesIO()
    noise("RGB", 9, 5).save(buffer, "JPEG", exif=exif)
    assert images.decode(buffer.getvalue()).size == (9, 5)


@pytest.mark.parametrize("data", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_decode_refuses_other_data(data: bytes) -> None:
    with pytest.raises(ValueError, match=f"not a usable image \\({len(data)} bytes\\)"):
        images.decode(data)


@settings(deadline=None)
@given(st.data())
def test_decode_of_a_broken_file_raises_only_value_error(data: st.DataObject) -> None:
    file_format = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF"]))
    broken = bytearray(encoded(noise("RGB", 9, 5), file_format))
    for _ in range(data.draw(st.integers(0, 8))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    del broken[data.draw(st.integers(0, len(broken))) :]
    try:
        image = images.decode(bytes(broken), max_pixels=1000)
    except ValueError:
        return
    assert 0 < image.width * image.height <= 1000


@pytest.mark.parametrize(("width", "height"), [(40_000, 40_000), (10_000, 5_000)])
def test_decode_refuses_a_bomb_by_its_header(width: int, height: int) -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match=r"pixels.*exceeds limit|10000x5000 pixels; 1 to 1000000 are allowed"):
        images.decode(bomb, max_pixels=1_000_000)


def test_normalize_equals_float64_and_takes_jax_arrays() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
    expected = (pixels / 255.0 - np.array(images.OPENAI_MEAN)) / np.array(images.OPENAI_STD)
    in_numpy = images.normalize(pixels, images.OPENAI_MEAN, images.OPENAI_STD)
    in_jax = images.normalize(jnp.asarray(pixels), images.OPENAI_MEAN, images.OPENAI_STD)
    assert isinstance(in_numpy, np.ndarray) and in_numpy.dtype == np.float32
    assert isinstance(in_jax, jnp.ndarray) and in_jax.dtype == jnp.float32
    np.testing.assert_allclose(in_numpy, expected, rtol=0, atol=5e-7)
    np.testing.assert_allclose(in_jax, expected, rtol=0, atol=5e-7)


def test_open_clip_config_round_trip() -> None:
    p = Preprocess((32, 48), images.HALF_MEAN, images.HALF_STD, "bilinear", "squash")
    assert Preprocess.from_open_clip(p.to_open_clip()) == p
    assert Preprocess.from_open_clip({"mean": [0.5] * 3, "std": [0.5] * 3}, 32) == Preprocess(
        32, images.HALF_MEAN, images.HALF_STD
    )
    assert Preprocess.from_open_clip({"size": 64, "interpolation": "random", "std": None}) == Preprocess((64, 64))


@pytest.mark.torch
def test_open_clip_accepts_every_key() -> None:
    transform = pytest.importorskip("open_clip.transform")
    cfg = transform.PreprocessCfg(**Preprocess(224).to_open_clip())
    assert cfg == transform.PreprocessCfg(size=(224, 224))


@pytest.mark.torch
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_hugging_face_config_gives_the_same_pixels(interpolation: str, resize_mode: str) -> None:
    transformers = pytest.importorskip("transformers")
    p = Preprocess(32, images.HALF_MEAN, images.HALF_STD, interpolation, resize_mode)
    processor = transformers.CLIPImageProcessorPil(**p.to_hugging_face())
    for width, height in [(32, 32), (64, 64), (48, 32), (33, 77)]:  # sizes at which both crop the same pixels
        image = noise("RGB", width, height)
        theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        ours = images.normalize(images.preprocess(image, p), p.mean, p.std)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-7, err_msg=f"{width}x{height}")


@pytest.mark.parametrize(("size", "resize_mode"), [(32, "longest"), ((32, 48), "shortest")])
def test_hugging_face_config_refuses_unsupported_modes(size: int | tuple[int, int], resize_mode: str) -> None:
    with pytest.raises(ValueError, match=f"no resize_mode '{resize_mode}'"):
        Preprocess(size, resize_mode=resize_mode).to_hugging_face()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "image size"),
        ({"size": (1, 2, 3)}, "image size"),
        ({"size": 8, "mean": (0.5,)}, "not three numbers"),
        ({"size": 8, "mean": 0.5}, "not three numbers"),
        ({"size": 8, "mean": ("a", 0.5, 0.5)}, "not three numbers"),
        ({"size": 8, "std": (float("nan"), 0.5, 0.5)}, "not three numbers"),
        ({"size": [1.5, 2]}, "not one positive number"),
        ({"size": "22"}, "not one positive number"),
        ({"size": 8, "interpolation": ["bicubic"]}, "is not one of bicubic, bilinear"),
        ({"size": 8, "std": (0.5, 0.5, 0.0)}, "std above 0"),
        ({"size": 8, "interpolation": "lanczos"}, "'lanczos' is not one of bicubic, bilinear"),
        ({"size": 8, "resize_mode": "short"}, "'short' is not one of shortest, longest, squash"),
    ],
)
def test_preprocess_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**arguments)  # type: ignore[arg-type]


def test_from_open_clip_refuses_a_fill_colour() -> None:
    with pytest.raises(ValueError, match="fill_color 0"):
        Preprocess.from_open_clip({"size": 8, "fill_color": 255, "resize_mode": "longest"})
    assert Preprocess.from_open_clip({"size": 8, "fill_color": 255, "resize_mode": "squash"}).size == (8, 8)


@pytest.mark.parametrize("field", ["size", "mean", "std", "interpolation", "resize_mode"])
@pytest.mark.parametrize("value", ["\x1b[31m\n\u2028", [0] * 5000, "x" * 5000])
def test_the_error_of_an_invalid_value_is_one_short_line(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field.split('_')[0]}|image size") as raised:
        Preprocess(**{"size": 32, field: value})
    assert str(raised.value).isprintable() and len(str(raised.value)) < 400
