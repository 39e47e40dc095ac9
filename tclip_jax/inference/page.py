"""Search results as one HTML page that needs nothing else: the pictures are in it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from etils import epath
from PIL import Image, ImageOps

from tclip_jax.data.images import decode
from tclip_jax.inference.inputs import printable

_SIDE, _SMALL = 320, 64  # pixels of a thumbnail's longer side: twice those on the page, and what is enlarged to be seen

# Whatever a name may hold, the policy lets the page load nothing.
_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere; }}
h1 img {{ height: 5rem; vertical-align: middle; }}
p {{ opacity: .7; overflow-wrap: anywhere; }}
ol {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: 1rem; padding: 0; }}
li {{ list-style: none; border: 1px solid #8884; border-radius: .5rem; overflow: hidden; }}
.picture {{ height: 10rem; display: flex; align-items: center; justify-content: center; background: #8881; }}
.picture img {{ max-width: 100%; max-height: 10rem; }}
.bar {{ height: .25rem; background: #3b6fb6; }}
.text {{ padding: .4rem .6rem; overflow-wrap: anywhere; font-size: .85rem; }}
b {{ font-variant-numeric: tabular-nums; }}
</style>
<h1>{title}{picture}</h1>
<p>{facts}</p>
<ol>
{results}
</ol>
"""


def results_page(
    query: str, facts: str, results: Sequence[tuple[epath.Path, str, float]], picture: epath.Path | None = None
) -> str:
    """One page with the results (file, name, similarity) in their order.

    Args:
      query: the text, or the path of the picture.
      facts: a line about what was searched.
      picture: the query, where it is one.
    """
    best = max((score for *_, score in results), default=0)
    cards = [
        f'<li><div class="picture">{_thumbnail(path)}</div>'
        f'<div class="bar" style="width: {100 * max(score, 0) / max(best, 1e-9):.1f}%"></div>'
        f'<div class="text"><b>{rank}. {score:.3f}</b><br>{html.escape(printable(name))}</div></li>'
        for rank, (path, name, score) in enumerate(results, 1)
    ]
    return _PAGE.format(
        title=html.escape(printable(query)),
        facts=html.escape(printable(facts)),
        picture=f" {_thumbnail(picture)}" if picture else "",
        results="\n".join(cards),
    )


def _thumbnail(path: epath.Path) -> str:
    """The picture as a small img element, upright, or why there is none."""
    try:
        image = ImageOps.exif_transpose(decode(path.read_bytes()))
    except (OSError, ValueError):
        return "<small>no longer readable</small>"
    opaque = image.mode in ("RGB", "L", "CMYK", "YCbCr") and "transparency" not in image.info
    image = image.convert("RGB" if opaque else "RGBA")
    if max(image.size) < _SMALL:
        image = ImageOps.scale(image, 2 * _SMALL // max(image.size), Image.Resampling.NEAREST)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if opaque else "PNG", **({"quality": 85} if opaque else {}))
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/{"jpeg" if opaque else "png"};base64,{data}">'
