"""RandAugment: each operation equals torchvision's."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tclip_jax.data.augment import OPERATIONS, rand_augment


def noise(width: int, height: int) -> Image.Image:
    smooth = np.random.default_rng(0).integers(30, 220, (height // 4, width // 4, 3), np.uint8)
    return Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.torch
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("level", [0, 9, 30])
@pytest.mark.parametrize("sign", [1, -1])
def test_each_operation_equals_torchvision(name: str, level: int, sign: int) -> None:
    autoaugment = pytest.importorskip("torchvision.transforms.autoaugment")
    image = noise(48, 36)
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
    image, rng = noise(32, 32), np.random.default_rng(0)
    views = {rand_augment(image, rng, operations=1).tobytes() for _ in range(200)}
    # Every operation gives one view; those with a random sign give two.
    signed = sum(signed for _, signed, _ in OPERATIONS.values())
    assert len(views) == len(OPERATIONS) + signed
    assert rand_augment(image, rng, operations=0) is image
