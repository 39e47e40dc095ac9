"""Random augmentations of training images. The caller's generator makes every random draw."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from tclip_jax.data.images import Preprocess, load, preprocess
from tclip_jax.registry import Registry

Box = tuple[int, int, int, int]
Color = tuple[int, int, int]
Operation = Callable[[Image.Image, float], Image.Image]
Augmentation = Callable[[Image.Image, np.random.Generator, Preprocess], npt.NDArray[np.uint8]]

# Version of the augmentations, part of the key of teacher caches. Increase it when an augmentation gives other pixels
# for the same draws.
DRAWS = 1

_LEVELS = 31
_ONE_READ = 1 << 24  # bytes that Pillow passes to its decoder at once, for data in memory


def rand_augment(image: Image.Image, rng: np.random.Generator, operations: int = 2, magnitude: int = 9) -> Image.Image:
    """Apply RandAugment (Cubuk et al., arXiv 1909.13719) to an RGB image.

    The draws and strengths are those of torchvision's RandAugment with nearest-neighbour interpolation and black fill.
    torchvision's implementation needs PyTorch and draws from PyTorch's global generator.

    Args:
      image: RGB.
      rng: makes the random draws.
      operations: number of operations, drawn from OPERATIONS with replacement.
      magnitude: strength of every operation, 0 to 30.
    """
    for _ in range(operations):
        name = _NAMES[rng.integers(len(_NAMES))]
        operation, signed, strength = OPERATIONS[name]
        amount = strength(magnitude / (_LEVELS - 1), image)
        image = operation(image, -amount if signed and rng.random() < 0.5 else amount)
    return image


def _transform(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def _shear_x(image: Image.Image, amount: float) -> Image.Image:
    return _transform(image, (1, amount, 0, 0, 1, 0))


def _shear_y(image: Image.Image, amount: float) -> Image.Image:
    return _transform(image, (1, 0, 0, amount, 1, 0))


def _translate_x(image: Image.Image, amount: float) -> Image.Image:
    return _transform(image, (1, 0, -int(amount), 0, 1, 0))


def _translate_y(image: Image.Image, amount: float) -> Image.Image:
    return _transform(image, (1, 0, 0, 0, 1, -int(amount)))


def _rotate(image: Image.Image, amount: float) -> Image.Image:
    return image.rotate(amount, Image.Resampling.NEAREST)


def _brightness(image: Image.Image, amount: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1 + amount)


def _color(image: Image.Image, amount: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(1 + amount)


def _contrast(image: Image.Image, amount: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(1 + amount)


def _sharpness(image: Image.Image, amount: float) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(1 + amount)


def _posterize(image: Image.Image, amount: float) -> Image.Image:
    return ImageOps.posterize(image, int(amount))


def _solarize(image: Image.Image, amount: float) -> Image.Image:
    return ImageOps.solarize(image, math.ceil(amount))


# name -> (operation, whether its amount has a random sign, the amount for a strength of 0 to 1).
OPERATIONS: dict[str, tuple[Operation, bool, Callable[[float, Image.Image], float]]] = {
    "identity": (lambda image, _: image, False, lambda share, image: 0),
    "shear_x": (_shear_x, True, lambda share, image: 0.3 * share),
    "shear_y": (_shear_y, True, lambda share, image: 0.3 * share),
    "translate_x": (_translate_x, True, lambda share, image: 150 / 331 * image.width * share),
    "translate_y": (_translate_y, True, lambda share, image: 150 / 331 * image.height * share),
    "rotate": (_rotate, True, lambda share, image: 30 * share),
    "brightness": (_brightness, True, lambda share, image: 0.9 * share),
    "color": (_color, True, lambda share, image: 0.9 * share),
    "contrast": (_contrast, True, lambda share, image: 0.9 * share),
    "sharpness": (_sharpness, True, lambda share, image: 0.9 * share),
    "posterize": (_posterize, False, lambda share, image: 8 - round(4 * share)),
    "solarize": (_solarize, False, lambda share, image: 255 * (1 - share)),
    "autocontrast": (lambda image, _: ImageOps.autocontrast(image), False, lambda share, image: 0),
    "equalize": (lambda image, _: ImageOps.equalize(image), False, lambda share, image: 0),
}
_NAMES = tuple(OPERATIONS)


def affine(
    image: Image.Image, degrees: float, shift: tuple[float, float], zoom: float, fill: Color | None = None
) -> Image.Image:
    """Rotate and zoom an image about its centre, then shift it, in one bilinear resampling; return RGB.

    Args:
      image: any mode.
      degrees: rotation, counter-clockwise.
      shift: (right, down) in pixels.
      zoom: magnification.
      fill: colour of pixels from outside the image; None for the colour of its top left pixel.
    """
    image = image.convert("RGB")
    x, y = image.width / 2, image.height / 2
    # Pillow's matrix maps output pixels to input pixels: the inverse of the motion. Pillow truncates values to uint8,
    # so a cosine of 6e-17 at a right angle would darken pixels by one.
    cos, sin = (round(f(math.radians(degrees)), 15) / zoom for f in (math.cos, math.sin))
    to_x, to_y = x + shift[0], y + shift[1]
    matrix = (cos, -sin, x - cos * to_x + sin * to_y, sin, cos, y - sin * to_x - cos * to_y)
    outside = image.getpixel((0, 0)) if fill is None else fill
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=outside)


def random_affine(
    image: Image.Image,
    rng: np.random.Generator,
    degrees: float = 15.0,
    translate: float = 0.1,
    zoom: float = 0.15,
    fill: Color | None = None,
) -> Image.Image:
    """Apply `affine` with uniform random parameters; the zoom is log-uniform.

    Args:
      image: any mode.
      rng: makes the random draws.
      degrees: the largest rotation in both directions.
      translate: the largest shift in both directions, as a fraction of the image's width and height.
      zoom: bounds the magnification to 1 / (1 + zoom) … 1 + zoom.
      fill: as in `affine`.
    """
    angle, right, down, log_zoom = rng.uniform(-1, 1, 4)
    shift = (right * translate * image.width, down * translate * image.height)
    return affine(image, angle * degrees, shift, (1 + zoom) ** log_zoom, fill)


def random_crop_box(
    rng: np.random.Generator, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Draw a crop box in an image, as torchvision's RandomResizedCrop does.

    Args:
      rng: makes the random draws.
      size: (width, height) of the image.
      scale: bounds of the box's fraction of the image area.
      ratio: bounds of width / height, which is log-uniform.

    Returns:
      (left, top, right, bottom). If ten boxes do not fit: the largest centred box with a ratio within the bounds.
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_resized_crop(
    image: Image.Image,
    rng: np.random.Generator,
    size: tuple[int, int],
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """Crop a random box and resize it with bicubic interpolation: CLIP's training transform.

    If a side of the box is at least twice as long as its target, pixels are first averaged by an integer factor. If
    both sides are, a JPEG that is not decoded yet is decoded at 1/2, 1/4 or 1/8 of its size. This is up to four times
    as fast; the low-pass filter then differs slightly from torchvision's.

    Args:
      image: any mode; a JPEG from `open_lazily` must not be loaded yet.
      rng: makes the random draws.
      size: (height, width) of the result.
      scale, ratio: as in `random_crop_box`.

    Returns:
      An RGB image.
    """
    box = random_crop_box(rng, image.size, scale, ratio)
    full, (left, top, right, bottom) = image.size, box
    if isinstance(image, JpegImageFile):
        image.draft(None, (-(-full[0] * size[1] // (right - left)), -(-full[1] * size[0] // (bottom - top))))
        image.decodermaxblock = _ONE_READ
    image = load(image)
    if image.mode not in ("RGB", "L"):  # before resampling, as in open_clip's loader of tars
        image = image.convert("RGB")
    if right - left < 2 * size[1] and bottom - top < 2 * size[0]:
        return image.crop(box).resize(size[::-1], Image.Resampling.BICUBIC).convert("RGB")
    x, y = image.width / full[0], image.height / full[1]
    smaller = (left * x, top * y, right * x, bottom * y)
    return image.resize(size[::-1], Image.Resampling.BICUBIC, smaller, reducing_gap=1.0).convert("RGB")


def random_erasing(
    pixels: npt.NDArray[np.uint8],
    rng: np.random.Generator,
    fill: npt.ArrayLike,
    probability: float = 0.25,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
) -> npt.NDArray[np.uint8]:
    """Fill a random box with a colour (Zhong et al., "Random Erasing Data Augmentation", arXiv 1708.04896).

    The draws are those of torchvision's RandomErasing.

    Args:
      pixels: (H, W, 3).
      rng: makes the random draws.
      fill: the colour.
      probability: probability of erasing a box.
      scale: bounds of the box's fraction of the image area.
      ratio: bounds of height / width, which is log-uniform.

    Returns:
      A copy of `pixels`. If ten boxes do not fit, nothing is erased.
    """
    erased = pixels.copy()
    if rng.random() >= probability:
        return erased
    height, width = pixels.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            erased[top : top + h, left : left + w] = fill
            break
    return erased


def _none(image: Image.Image, rng: np.random.Generator, p: Preprocess) -> npt.NDArray[np.uint8]:
    return preprocess(load(image), p)


def _affine(image: Image.Image, rng: np.random.Generator, p: Preprocess) -> npt.NDArray[np.uint8]:
    # After resizing: the cost does not depend on the source, and rotations of small images are smooth.
    return np.asarray(random_affine(Image.fromarray(preprocess(load(image), p)), rng))


def _random_resized_crop(image: Image.Image, rng: np.random.Generator, p: Preprocess) -> npt.NDArray[np.uint8]:
    return np.asarray(random_resized_crop(image, rng, p.size))


def _wide_crop(image: Image.Image, rng: np.random.Generator, p: Preprocess) -> npt.NDArray[np.uint8]:
    return np.asarray(random_resized_crop(image, rng, p.size, scale=(0.4, 1.0)))


def _strong(image: Image.Image, rng: np.random.Generator, p: Preprocess) -> npt.NDArray[np.uint8]:
    fill = np.round(np.array(p.mean) * 255).astype(np.uint8)  # zero after normalisation
    view = rand_augment(random_resized_crop(image, rng, p.size, scale=(0.08, 1.0)), rng)
    return random_erasing(np.asarray(view), rng, fill)


# The values of config.data.augment. Each function returns (height, width, 3) uint8 pixels of the preprocessing's size.
AUGMENTATIONS: Registry[Augmentation] = Registry(
    "augmentation",
    {
        "none": _none,
        "affine": _affine,
        "random_resized_crop": _random_resized_crop,  # 0.9 to 1 of the area, as in CLIP, open_clip and CLIP-KD
        "wide_crop": _wide_crop,  # 0.4 to 1 of the area
        "strong": _strong,  # 0.08 to 1 of the area, RandAugment, random erasing; for reinforced training (MobileCLIP)
    },
)
