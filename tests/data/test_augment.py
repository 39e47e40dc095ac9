"""Random augmentations: geometry against NumPy, crops and RandAugment against torchvision."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tclip_jax.data.augment import (
    AUGMENTATIONS,
    OPERATIONS,
    affine,
    rand_augment,
    random_affine,
    random_crop_box,
    random_erasing,
    random_resized_crop,
)
from tclip_jax.data.images import Preprocess, load, open_lazily, preprocess


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_the_seed_determines_every_augmentation(name: str, mode: str) -> None:
    image, p = noise(41, 30).convert(mode), Preprocess((24, 28))
    first, again, other = (AUGMENTATIONS[name](image, np.random.default_rng(seed), p) for seed in (3, 3, 4))
    assert first.shape == (24, 28, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first == other).all() == (name == "none")


def test_none_is_preprocess() -> None:
    image, p = noise(41, 30), Preprocess(24)
    np.testing.assert_array_equal(AUGMENTATIONS["none"](image, np.random.default_rng(), p), preprocess(image, p))


@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
def test_zero_strength_is_the_identity(size: tuple[int, int]) -> None:
    image, rng = noise(*size), np.random.default_rng(0)
    np.testing.assert_array_equal(np.asarray(random_affine(image, rng, degrees=0, translate=0, zoom=0)), image)
    same = random_resized_crop(image, rng, size[::-1], scale=(1, 1), ratio=(size[0] / size[1],) * 2)
    np.testing.assert_array_equal(np.asarray(same), image)


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_right_angles_equal_rot90(quarter_turns: int) -> None:
    image = noise(16, 16)
    turned = affine(image, 90 * quarter_turns, (0, 0), 1)
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(image), quarter_turns))


@settings(deadline=None)
@given(right=st.integers(-5, 5), down=st.integers(-5, 5))
def test_a_shift_moves_the_pixels_and_fills_the_border(right: int, down: int) -> None:
    image, fill = noise(9, 7), (1, 2, 3)
    padded = np.full((7 + 10, 9 + 10, 3), fill, np.uint8)
    padded[5:12, 5:14] = np.asarray(image)
    expected = padded[5 - down : 12 - down, 5 - right : 14 - right]
    np.testing.assert_array_equal(np.asarray(affine(image, 0, (right, down), 1, fill)), expected)


def test_zoom_two_is_the_bilinear_enlargement_of_the_centre() -> None:
    image = noise(8, 8)
    whole = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR), np.int32)
    zoomed = np.asarray(affine(image, 0, (0, 0), 2), np.int32)
    assert np.abs(zoomed - whole[4:12, 4:12]).max() <= 1  # Pillow rounds in two ways


def test_the_default_fill_is_the_corner_colour() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0, 0] = 7, 8, 9
    shifted = np.asarray(affine(Image.fromarray(pixels), 0, (8, 0), 1))
    assert (shifted == (7, 8, 9)).all()


def test_the_parameters_bound_the_shift() -> None:
    # The shift is the new position of one white pixel at the centre.
    pixels = np.zeros((41, 41, 3), np.uint8)
    pixels[20, 20] = 255
    rng = np.random.default_rng(0)
    centres = []
    for _ in range(200):
        view = np.asarray(random_affine(Image.fromarray(pixels), rng, degrees=30, translate=0.1, zoom=0.1), float)
        weights = view[..., 0] / view[..., 0].sum()
        centres.append([(weights.sum(0) * np.arange(41)).sum() - 20, (weights.sum(1) * np.arange(41)).sum() - 20])
    reach = np.abs(centres).max(0)
    assert (reach <= 4.1 + 0.5).all() and (reach > 3.5).all()


@settings(deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    low=st.floats(0.05, 1.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_crop_boxes_lie_inside_the_image_and_the_bounds(width: int, height: int, low: float, seed: int) -> None:
    left, top, right, bottom = random_crop_box(np.random.default_rng(seed), (width, height), (low, 1.0), (0.75, 4 / 3))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    assert 0.75 * (h - 0.5) - 0.5 <= w <= 4 / 3 * (h + 0.5) + 0.5  # each side is rounded to whole pixels


def test_crop_boxes_cover_all_scales_and_positions() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box(rng, (1000, 1000), (0.2, 0.6), (0.75, 4 / 3)) for _ in range(2000)])
    share = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 1e6
    np.testing.assert_allclose([share.min(), share.mean(), share.max()], [0.2, 0.4, 0.6], atol=0.01)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    np.testing.assert_allclose(centres.mean(0), [500, 500], atol=10)


@pytest.mark.parametrize(("size", "box"), [((100, 10), (43, 0, 56, 10)), ((10, 100), (0, 43, 10, 56))])
def test_too_long_images_give_a_centred_box(size: tuple[int, int], box: tuple[int, ...]) -> None:
    assert random_crop_box(np.random.default_rng(0), size, (0.9, 1.0), (0.75, 4 / 3)) == box


@pytest.mark.torch
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
def test_resized_crop_equals_torchvision(mode: str) -> None:
    """torchvision crops an RGB image here, because open_clip's loader of tars decodes with webdataset's "pilrgb"."""
    transforms = pytest.importorskip("torchvision.transforms")
    image, scale, ratio = noise(61, 47).convert(mode), (0.3, 1.0), (0.75, 4 / 3)
    for seed in range(10):
        left, top, right, bottom = random_crop_box(np.random.default_rng(seed), image.size, scale, ratio)
        bicubic = transforms.InterpolationMode.BICUBIC
        expected = transforms.functional.resized_crop(
            image.convert("RGB"), top, left, bottom - top, right - left, [24, 32], bicubic
        )
        ours = random_resized_crop(image, np.random.default_rng(seed), (24, 32), scale, ratio)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
@pytest.mark.parametrize(("width", "height"), [(1600, 1600), (700, 480), (480, 480)])
def test_large_images_are_decoded_and_averaged_at_a_smaller_size(width: int, height: int, file_format: str) -> None:
    buffer = io.BytesIO()
    noise(25, 25).resize((width, height), Image.Resampling.BICUBIC).save(buffer, file_format)
    lazy, whole = open_lazily(buffer.getvalue()), load(open_lazily(buffer.getvalue()))
    ours = np.asarray(random_resized_crop(lazy, np.random.default_rng(1), (300, 300)), np.float64)
    box = random_crop_box(np.random.default_rng(1), whole.size, (0.9, 1.0), (3 / 4, 4 / 3))
    expected = np.asarray(whole.crop(box).resize((300, 300), Image.Resampling.BICUBIC), np.float64)
    assert lazy.size == ((400, 400) if width == 1600 and file_format == "JPEG" else whole.size)
    error = np.abs(ours - expected)
    assert error.mean() < 1  # of 255; exactly equal if no side is twice as long
    assert (error == 0).all() == (width == 480)


@settings(deadline=None)
@given(height=st.integers(1, 60), width=st.integers(1, 60), seed=st.integers(0, 2**32 - 1))
def test_erasing_fills_one_box_within_bounds(height: int, width: int, seed: int) -> None:
    pixels = np.zeros((height, width, 3), np.uint8)
    erased = random_erasing(pixels, np.random.default_rng(seed), (1, 2, 3), probability=1.0)
    assert not pixels.any()
    rows, columns = (np.flatnonzero(erased[..., 0].any(axis=axis)) for axis in (1, 0))
    if rows.size:
        box = erased[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (box == (1, 2, 3)).all() and np.count_nonzero(erased) == box.size
        h, w = box.shape[:2]
        assert 0.02 * height * width <= (h + 0.5) * (w + 0.5) and (h - 0.5) * (w - 0.5) <= 0.33 * height * width
        assert 0.3 * (w - 0.5) <= h + 0.5 and h - 0.5 <= 3.3 * (w + 0.5)


def test_erasing_happens_with_the_given_probability() -> None:
    pixels, rng = np.zeros((32, 32, 3), np.uint8), np.random.default_rng(0)
    erased = sum(random_erasing(pixels, rng, 255, probability=0.25).any() for _ in range(1000))
    assert 200 <= erased <= 300


def smooth_noise(width: int, height: int) -> Image.Image:
    smooth = np.random.default_rng(0).integers(30, 220, (height // 4, width // 4, 3), np.uint8)
    return Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.torch
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("level", [0, 9, 30])
@pytest.mark.parametrize("sign", [1, -1])
def test_each_operation_equals_torchvision(name: str, level: int, sign: int) -> None:
    autoaugment = pytest.importorskip("torchvision.transforms.autoaugment")
    image = smooth_noise(48, 36)
    theirs = "".join(part.capitalize() for part in name.replace("autocontrast", "auto_contrast").split("_"))
    magnitudes, has_sign = autoaugment.RandAugment()._augmentation_space(31, (image.height, image.width))[theirs]
    operation, signed, strength = OPERATIONS[name]
    assert signed == has_sign
    magnitude = float(magnitudes[level] if magnitudes.ndim else 0)
    amount = strength(level / 30, image)
    assert amount == pytest.approx(magnitude, rel=1e-6)
    sign = sign if signed else 1
    nearest = autoaugment.InterpolationMode.NEAREST
    expected = np.asarray(autoaugment._apply_op(image, theirs, sign * magnitude, nearest, None))
    np.testing.assert_array_equal(np.asarray(operation(image, sign * amount)), expected)


def test_every_operation_is_drawn() -> None:
    image, rng = smooth_noise(32, 32), np.random.default_rng(0)
    views = {rand_augment(image, rng, operations=1).tobytes() for _ in range(200)}
    # Every operation gives one view; those with a random sign give two.
    signed = sum(signed for _, signed, _ in OPERATIONS.values())
    assert len(views) == len(OPERATIONS) + signed
    assert rand_augment(image, rng, operations=0) is image
