"""Read preprocessor_config.json, with the defaults of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tclip_jax.data.images import OPENAI_MEAN, OPENAI_STD, Preprocess
from tclip_jax.interop.reader import check_object

_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
_PREPROCESSOR: dict[str, Any] = {
    "do_resize": True,
    "size": 224,
    "resample": 3,
    "do_center_crop": True,
    "crop_size": 224,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": OPENAI_MEAN,
    "image_std": OPENAI_STD,
}


def preprocess_from_hugging_face(fields: Mapping[str, Any]) -> Preprocess:
    """Return the preprocessing of a preprocessor_config.json, the inverse of `Preprocess.to_hugging_face`.

    A file of CLIPImageProcessor may omit fields that equal the defaults of that class.

    Raises:
      ValueError: open_clip cannot express the preprocessing, or a file of another class omits a required field.
    """
    check_object("the preprocessing", fields)
    stated = {key: value for key, value in fields.items() if value is not None}
    processor = str(stated.get("image_processor_type", stated.get("feature_extractor_type", "CLIP")))
    is_clip = processor.startswith("CLIP")
    missing = [key for key in ("size", "resample", "image_mean", "image_std") if key not in stated]
    if not is_clip and missing:
        raise ValueError(
            f"lacks {missing[0]}: only for CLIPImageProcessor is the default known, not for {processor!r:.80}"
        )
    known = _PREPROCESSOR | {"do_center_crop": is_clip} | stated
    for key in ("do_resize", "do_rescale"):
        if not known[key]:
            raise ValueError(f"{key} is false: it must be true")
    if known.get("use_square_size"):
        raise ValueError("use_square_size is true: write the height and width as size")
    factor, resample = known["rescale_factor"], known["resample"]
    if not isinstance(factor, int | float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(f"rescale_factor is {factor!r:.80}: it must be 1/255")
    if resample not in list(_INTERPOLATIONS):
        raise ValueError(f"resample is {resample!r:.80}: it must be 2 (bilinear) or 3 (bicubic)")
    size, squash = _sides("size", known["size"], square=not is_clip)
    crop = _sides("crop_size", known["crop_size"], square=True)[0] if known["do_center_crop"] else None
    if crop is None and not squash:
        raise ValueError(
            f"size {known['size']!r:.80} is the shorter side and do_center_crop is false: the images have no fixed size"
        )
    if crop not in (None, size):
        raise ValueError(
            f"size {known['size']!r:.80} and crop_size {known['crop_size']!r:.80} differ: they must be equal"
        )
    normalized = known["do_normalize"]
    return Preprocess(
        size,
        known["image_mean"] if normalized else (0.0,) * 3,
        known["image_std"] if normalized else (1.0,) * 3,
        _INTERPOLATIONS[resample],
        "squash" if squash else "shortest",
    )


def _sides(name: str, size: Any, square: bool) -> tuple[tuple[int, int], bool]:
    """Return height and width, and whether both are fixed; one number means both if `square`, else the shorter side."""
    if isinstance(size, Mapping) and size.keys() == {"shortest_edge"}:
        return (size["shortest_edge"],) * 2, False
    if isinstance(size, Mapping) and size.keys() == {"height", "width"}:
        return (size["height"], size["width"]), True
    if isinstance(size, list | tuple) and len(size) == 2:
        return (size[0], size[1]), True
    if type(size) is not int:
        raise ValueError(f"{name} is {size!r:.80}: it must be a number, shortest_edge alone, or height and width")
    return (size, size), square
