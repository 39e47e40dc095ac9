"""Whether a sample can be trained on, by decoding all of it."""

from __future__ import annotations

from PIL import Image

from tclip_jax.data.images import TooManyPixels
from tclip_jax.data.pipeline import read, to_pil
from tclip_jax.data.sources import BadSample, Record, Source
from tclip_jax.data.sources.base import Fault


def examine(source: Source, index: int, *, captioned: bool = True) -> tuple[Record, Image.Image]:
    """A sample and its decoded image; unless `captioned`, its label may stand for captions.

    Raises:
      BadSample: it would count with weight 0 in training.
    """
    record = read(source, index)
    try:
        image = to_pil(record.image)
    except ValueError as error:
        kind: Fault = "too_many_pixels" if isinstance(error, TooManyPixels) else "corrupt_image"
        raise BadSample(kind, record.name, str(error)) from None
    if captioned and not any(caption.strip() for caption in record.captions):
        raise BadSample("no_caption", record.name, "no caption")
    return record, image
