"""Aligned text tables and self-contained HTML pages.

A page is a sequence of headings, tables and pictures, so plain functions suffice and a template engine is not needed.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

_PIXELS_PER_INCH = 96  # of CSS

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
h1, h2, p, summary {{ overflow-wrap: anywhere; }}
.wide {{ overflow-x: auto; max-width: 100%; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
td, th {{ padding: .1rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
td:first-child, th:first-child {{ text-align: left; padding-left: 0; }}
.over {{ background: #f6d5cc; }}
.good {{ color: #2a7d3f; }}
.bad {{ color: #c0392b; }}
.verdict {{ font-weight: 600; }}
.note {{ color: #666; }}
img {{ max-width: 100%; }}
.plot {{ display: block; min-width: 40rem; }}
.cards {{ display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1rem; margin: .7rem 0; }}
.cards .wide {{ margin: 0; }}
figure {{ margin: 0; width: 8.5rem; font-size: 12px; line-height: 1.35; overflow-wrap: anywhere; }}
figure img.small {{ image-rendering: pixelated; }}
figure img {{ display: block; width: 8.5rem; height: 8.5rem; object-fit: contain; background: #f2f2f2; }}
details {{ border-top: 1px solid #ddd; padding: .5rem 0; }}
summary {{ cursor: pointer; font-weight: 600; }}
@media (max-width: 40rem) {{ body {{ margin: 1rem auto; }} h1 {{ font-size: 1.4em; }} .cards {{ gap: .7rem; }} }}
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


def details(title: str, body: str, *, is_open: bool = True, anchor: str = "") -> str:
    """Return a section that a click closes and opens; the title is escaped, the body is HTML.

    Args:
      title: what is always shown.
      body: what a click hides.
      is_open: whether it is shown at first.
      anchor: the name by which `links` of `table` find the section.
    """
    opened, name = " open" * is_open, f' id="{html.escape(anchor)}"' if anchor else ""
    return f"<details{opened}{name}><summary>{html.escape(title)}</summary>{body}</details>"


def table(
    rows: Sequence[Sequence[str]],
    *,
    header: bool = True,
    marked: Sequence[bool] = (),
    links: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Return a table of escaped cells, which scrolls by itself where the screen is narrower.

    Args:
      rows: the cells.
      header: whether the first row is a header.
      marked: whether each row is highlighted; may be shorter than `rows`.
      links: text of a first cell -> the `anchor` in this page to which it leads.
    """
    lines = []
    for i, row in enumerate(rows):
        tag = "th" if header and i == 0 else "td"
        mark = ' class="over"' if i < len(marked) and marked[i] else ""
        cells = [html.escape(cell) for cell in row]
        if row[0] in links:
            cells[0] = f'<a href="#{html.escape(links[row[0]])}">{cells[0]}</a>'
        lines.append(f"<tr{mark}>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def plot(figure: Any, alt: str) -> str:
    """Return a matplotlib figure as an embedded PNG of twice its size on the page, for fine screens."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=2 * _PIXELS_PER_INCH)
    picture = f'src="{data_uri(buffer.getvalue(), "png")}"'
    width = _PIXELS_PER_INCH * figure.get_figwidth()
    return f'<div class="wide"><img class="plot" alt="{html.escape(alt)}" style="width: {width:.0f}px" {picture}></div>'


def fit_rows(axes: Any, rows: float) -> None:
    """Size a plot of rows by their number, with the same space around one row as around forty.

    Args:
      axes: the axes; the rows are at 0, 1, …, the first at the bottom.
      rows: number of rows, with the space between them.
    """
    axes.figure.set_size_inches(8, 0.8 + 0.25 * (rows + 0.5))
    axes.set_ylim(-0.75, rows - 0.25)


def sample_name(name: str) -> str:
    """Return the name of a sample for below its picture: its end, and all of it where the pointer rests."""
    end = "/".join(name.split("/")[-2:])
    shown = html.escape(end if end == name else f"…/{end}")
    return f'<span class="note" title="{html.escape(name)}">{shown}</span>'


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


def without_details(message: str) -> str:
    """Return an error's message without what TensorStore appends: its state, and pages of source locations."""
    return re.sub(r" \[(?:source locations|tensorstore_spec|http_response_\w+)\b.*", "", message, flags=re.DOTALL)


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
