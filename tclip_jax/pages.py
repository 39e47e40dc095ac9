"""Tables and pages for people: aligned text, and HTML that needs and loads nothing else.

Not by Jinja2: a page is headings, tables and pictures one below the other, which functions put together as well.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }}
td, th {{ padding: .1rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
td:first-child, th:first-child {{ text-align: left; white-space: normal; }}
.over {{ background: #f6d5cc; }}
.good {{ color: #2a7d3f; }}
.bad {{ color: #c0392b; }}
.verdict {{ font-weight: 600; }}
.note {{ color: #666; }}
img {{ max-width: 100%; }}
.cards {{ display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1rem; margin: .7rem 0; }}
figure {{ margin: 0; width: 8.5rem; font-size: 12px; line-height: 1.35; overflow-wrap: anywhere; }}
figure img.small {{ image-rendering: pixelated; }}
figure img {{ display: block; width: 8.5rem; height: 8.5rem; object-fit: contain; background: #f2f2f2; }}
summary {{ cursor: pointer; margin: .5rem 0; }}
</style>
<h1>{title}</h1>
{body}
"""


def dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings, with names as "data.source"."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def page(title: str, body: str) -> str:
    """A whole page; the title is escaped, the body is HTML."""
    return _PAGE.format(title=html.escape(title), body=body)


def paragraph(text: str, kind: str = "") -> str:
    """A line of text, escaped; `kind` is "verdict good", "verdict bad", "note" or nothing."""
    return f'<p class="{kind}">{html.escape(text)}</p>'


def heading(text: str) -> str:
    """A heading within a page, escaped."""
    return f"<h2>{html.escape(text)}</h2>"


def details(title: str, body: str) -> str:
    """A part that opens on a click; the title is escaped, the body is HTML."""
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def table(rows: Sequence[Sequence[str]], *, header: bool = True, marked: Sequence[bool] = ()) -> str:
    """A table of escaped cells; the first row is its header, and a row is coloured where `marked` says so."""
    lines = []
    for i, row in enumerate(rows):
        tag = "th" if header and i == 0 else "td"
        mark = ' class="over"' if i < len(marked) and marked[i] else ""
        lines.append(f"<tr{mark}>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def plot(figure: Any, alt: str) -> str:
    """A matplotlib figure as an image within the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return f'<img alt="{html.escape(alt)}" src="{data_uri(buffer.getvalue(), "png")}">'


def data_uri(image: bytes, kind: str) -> str:
    """An image within the page; `kind` is png, jpeg or webp."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns two blanks apart: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


# Control characters can move a cursor, and those of direction reorder text: both lie about what stands there. Lone
# surrogates cannot be written.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, lines: bool = False) -> str:
    """Text that any terminal and file takes: control characters, and bytes of a name that are no UTF-8, become \\xNN.

    Args:
      text: a name, or a message that quotes a file.
      lines: whether line breaks and tabs stay as they are.
    """

    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        if lines and character in "\n\t":
            return character
        if "\udc80" <= character <= "\udcff":  # how Python writes a byte of a file name that is no UTF-8
            return f"\\x{ord(character) - 0xDC00:02x}"
        return character.encode("unicode_escape", "backslashreplace").decode()

    return _UNPRINTABLE.sub(escaped, text)
