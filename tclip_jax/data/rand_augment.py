"""RandAugment: a few random changes of shape and colour, each as strong as all the others."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Operation = Callable[[Image.Image, float], Image.Image]

_LEVELS = 31


def rand_augment(image: Image.Image, rng: np.random.Generator, operations: int = 2, magnitude: int = 9) -> Image.Image:
    """Returns the RGB image after `operations` of OPERATIONS, drawn with replacement, at `magnitude` of 0 to 30.

    The draws and strengths are those of torchvision's RandAugment, with nearest interpolation and black outside.
    Source: Cubuk et al., "RandAugment", arXiv 1909.13719.
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


# name -> (operation, whether its amount has a random sign, its amount by strength 0 to 1).
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
