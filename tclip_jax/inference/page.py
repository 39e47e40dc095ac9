"""Search results as one HTML page that needs nothing else: the pictures are in it."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence

from etils import epath
from PIL import Image, ImageOps

from tclip_jax.data.images import decode
from tclip_jax.pages import data_uri, page, paragraph, printable

_SIDE, _SMALL = 272, 64  # pixels of a thumbnail's longer side, twice those on the page, and what is shown as pixels


def results_page(
    query: str, facts: str, results: Sequence[tuple[epath.Path, str, float]], picture: epath.Path | None = None
) -> str:
    """One page with the results (file, name, similarity) in their order.

    Args:
      query: the text, or the path of the picture.
      facts: a line about what was searched.
      picture: the query, where it is one.
    """
    cards = [
        f"<figure>{_thumbnail(path)}<figcaption><b>{rank}. {score:.3f}</b><br>{html.escape(printable(name))}"
        "</figcaption></figure>"
        for rank, (path, name, score) in enumerate(results, 1)
    ]
    asked = f'<div class="cards"><figure>{_thumbnail(picture)}</figure></div>' if picture else ""
    body = f'{asked}{paragraph(printable(facts), "note")}<div class="cards">{"".join(cards)}</div>'
    return page(printable(query), body)


def _thumbnail(path: epath.Path) -> str:
    """The picture as a small img element, upright, or why there is none."""
    try:
        image = ImageOps.exif_transpose(decode(path.read_bytes()))
    except (OSError, ValueError):
        return paragraph("no longer readable", "note")
    opaque = image.mode in ("RGB", "L", "CMYK", "YCbCr") and "transparency" not in image.info
    small = ' class="small"' if max(image.size) < _SMALL else ""
    image = image.convert("RGB" if opaque else "RGBA")
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # JPEG would blur what is shown pixel by pixel.
    kind = "jpeg" if opaque and not small else "png"
    image.save(buffer, kind)
    return f'<img{small} alt="" src="{data_uri(buffer.getvalue(), kind)}">'
