"""Whether a sample can be trained on, by decoding all of it."""

from __future__ import annotations

from PIL import Image

from tclip_jax.data.pipeline import bad_image, has_class, read, to_pil
from tclip_jax.data.sources import BadSample, Record, Source


def examine(source: Source, index: int, *, captioned: bool = True) -> tuple[Record, Image.Image]:
    """A sample and its decoded image; unless `captioned`, its label may stand for captions.

    Raises:
      BadSample: it would count with weight 0 in training.
    """
    record = read(source, index)
    try:
        image = to_pil(record.image)
    except ValueError as error:
        raise bad_image(record, error) from None
    named = not captioned and has_class(record, source)
    if not named and not any(caption.strip() for caption in record.captions):
        raise BadSample("no_caption", record.name, "no caption" if captioned else "no caption and no valid label")
    return record, image
