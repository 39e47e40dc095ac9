"""Whether a captioned sample can be trained on, by decoding all of it."""

from __future__ import annotations

from PIL import Image

from tclip_jax.data import images
from tclip_jax.data.sources import Record, Source
from tclip_jax.data.sources.base import BadSample


def examine(source: Source, index: int) -> tuple[Record, Image.Image]:
    """A sample and its decoded image.

    Raises:
      BadSample: it would count with weight 0 in training.
    """
    record = source[index]
    if isinstance(record.image, bytes):
        try:
            image = images.decode(record.image)
        except ValueError as error:
            raise BadSample("corrupt_image", record.name, str(error)) from None
    else:
        image = Image.fromarray(record.image)
    if not any(caption.strip() for caption in record.captions):
        raise BadSample("no_caption", record.name, "no caption")
    return record, image
