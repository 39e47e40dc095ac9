"""Sources in memory, for tests of pipelines."""

from __future__ import annotations

import io

from PIL import Image

from tclip_jax.data.sources import Record

CLASSNAMES = ("cat", "dog")


class Records(list[Record]):
    """A source in memory."""

    classnames: tuple[str, ...] = ()


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def labelled(count: int) -> Records:
    """Returns records whose image has their index as its only shade, and whose label is index % 2."""
    source = Records(Record(png(i), (), i % 2, f"shade {i}") for i in range(count))
    source.classnames = CLASSNAMES
    return source
