"""Aligned text tables and self-contained HTML pages.

A page is a sequence of headings, tables and pictures, so plain functions suffice and a template engine is not needed.
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
    """Yield the values of nested mappings with dotted names, such as "data.source"."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def page(title: str, body: str) -> str:
    """Return a complete page; the title is escaped, the body is HTML."""
    return _PAGE.format(title=html.escape(title), body=body)


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph of escaped text; `kind` is its CSS class: "verdict good", "verdict bad", "note" or ""."""
    return f'<p class="{kind}">{html.escape(text)}</p>'


def heading(text: str) -> str:
    """Return a heading within the page, escaped."""
    return f"<h2>{html.escape(text)}</h2>"


def details(title: str, body: str) -> str:
    """Return a section that opens on a click; the title is escaped, the body is HTML."""
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def table(rows: Sequence[Sequence[str]], *, header: bool = True, marked: Sequence[bool] = ()) -> str:
    """Return a table of escaped cells.

    Args:
      rows: the cells.
      header: whether the first row is a header.
      marked: whether each row is highlighted; may be shorter than `rows`.
    """
    lines = []
    for i, row in enumerate(rows):
        tag = "th" if header and i == 0 else "td"
        mark = ' class="over"' if i < len(marked) and marked[i] else ""
        lines.append(f"<tr{mark}>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def plot(figure: Any, alt: str) -> str:
    """Return a matplotlib figure as an embedded PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return f'<img alt="{html.escape(alt)}" src="{data_uri(buffer.getvalue(), "png")}">'


def data_uri(image: bytes, kind: str) -> str:
    """Return the data URI of an image file; `kind` is png, jpeg or webp."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def aligned(rows: Sequence[Sequence[str]], *, right: bool = True) -> list[str]:
    """Return lines with columns two spaces apart, the first aligned left and the others right, or all left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    others = str.rjust if right else str.ljust
    return ["  ".join([row[0].ljust(widths[0]), *map(others, row[1:], widths[1:])]).rstrip() for row in rows]


# Control characters move the cursor and direction marks reorder text, so both can falsify the output of a terminal.
# Lone surrogates cannot be encoded.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, lines: bool = False) -> str:
    """Escape control characters and bytes that are not UTF-8 as \\xNN, so that any terminal or file accepts the text.

    Args:
      text: a name, or a message that quotes a file.
      lines: keep line breaks and tabs.
    """

    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        if lines and character in "\n\t":
            return character
        if "\udc80" <= character <= "\udcff":  # how Python represents a file name byte that is not UTF-8
            return f"\\x{ord(character) - 0xDC00:02x}"
        return character.encode("unicode_escape", "backslashreplace").decode()

    return _UNPRINTABLE.sub(escaped, text)
