"""Aligned text tables and self-contained HTML pages.

A page is a sequence of headings, tables and pictures, so plain functions suffice and a template engine is not needed.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

_PIXELS_PER_INCH = 96  # of CSS
_NARROW = 0.46  # width of a plot on a phone: 8 inches become 353 pixels
_LINE = 12  # characters: the longest text of a cell that is never broken

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.8em; line-height: 1.25; }}
h2 {{ font-size: 1.3em; margin: 2rem 0 .5rem; }}
h1, h2, p, summary {{ overflow-wrap: anywhere; }}
.wide {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
tr {{ background: #fff; }}
td, th {{ padding: .1rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
td {{ vertical-align: top; }}
th {{ vertical-align: bottom; }}
.text {{ text-align: left; white-space: normal; overflow-wrap: anywhere; }}
td:first-child, th:first-child {{ padding-left: 0; position: sticky; left: 0; background: inherit; }}
.over {{ background: #f6d5cc; }}
.good {{ color: #2a7d3f; }}
.bad {{ color: #c0392b; }}
.verdict {{ font-weight: 600; }}
.note {{ color: #666; }}
.plot {{ display: block; }}
.beside {{ display: flex; flex-wrap: wrap; align-items: flex-start; gap: 0 2rem; }}
.beside .wide {{ margin: .5rem 0; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1rem; margin: .7rem 0; }}
figure {{ margin: 0; font-size: 13px; line-height: 1.35; overflow-wrap: anywhere; }}
figure img, .blank {{ display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #f2f2f2; }}
figure img.small {{ image-rendering: pixelated; }}
.blank {{ box-sizing: border-box; padding: .5rem; color: #c0392b; }}
figcaption {{ margin-top: .25rem; }}
details {{ border-top: 1px solid #ddd; padding: .5rem 0; }}
summary {{ cursor: pointer; font-weight: 600; }}
@media (max-width: 40rem) {{
body {{ margin: 1rem auto; }}
h1 {{ font-size: 1.4em; }}
h2 {{ font-size: 1.2em; }}
td, th {{ padding: .1rem .45rem; }}
}}
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
    text: int = 1,
    marked: Sequence[bool] = (),
    links: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Return a table of escaped cells, which scrolls by itself where the screen is narrower; "" without rows.

    Args:
      rows: the cells.
      header: whether the first row is a header.
      text: number of columns that are text: aligned left, and broken into lines on a narrow screen. The others are
        numbers, aligned right. The first column stays in place when the table scrolls.
      marked: whether each row is highlighted; may be shorter than `rows`.
      links: text of a first cell -> the `anchor` in this page to which it leads.
    """
    widths = [min(max(map(len, column)), _LINE) for column in list(zip(*rows, strict=True))[:text]]
    lines = []
    for i, row in enumerate(rows):
        tag = "th" if header and i == 0 else "td"
        mark = ' class="over"' if i < len(marked) and marked[i] else ""
        kinds = [f' class="text" style="min-width: {width}ch"' if i == 0 else ' class="text"' for width in widths]
        cells = [*map(_breakable, row[:text]), *map(html.escape, row[text:])]
        if row[0] in links:
            cells[0] = f'<a href="#{html.escape(links[row[0]])}">{cells[0]}</a>'
        parts = itertools.zip_longest(kinds, cells, fillvalue="")
        lines.append(f"<tr{mark}>" + "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in parts) + "</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>' if rows else ""


def properties(rows: Sequence[Sequence[str]]) -> str:
    """Return a table of names and their values, all of them text."""
    return table(rows, header=False, text=max(map(len, rows), default=0))


def plot(figure: Any, alt: str) -> str:
    """Return a matplotlib figure as embedded PNGs: one for wide screens, one for phones with text of the same size.

    The pictures have two pixels for one of the page, for fine screens.
    """
    width, height = figure.get_size_inches()
    sizes, pictures = [], []
    for inches in (width, _NARROW * width):
        figure.set_figwidth(inches)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=2 * _PIXELS_PER_INCH)
        sizes.append(f'width="{_PIXELS_PER_INCH * inches:.0f}" height="{_PIXELS_PER_INCH * height:.0f}"')
        pictures.append(data_uri(buffer.getvalue(), "png"))
    figure.set_figwidth(width)
    narrow = f'<source media="(max-width: 40rem)" {sizes[1]} srcset="{pictures[1]}">'
    wide = f'<img class="plot" alt="{html.escape(alt)}" {sizes[0]} src="{pictures[0]}">'
    return f'<div class="wide"><picture>{narrow}{wide}</picture></div>'


def plot_axes(width: float, height: float) -> Any:
    """Return the axes of a new figure of a size in inches, with lines only at the left and the bottom."""
    from matplotlib.figure import Figure  # on demand: most pages have no plot

    axes = Figure(figsize=(width, height), layout="constrained", dpi=110).subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def row_axes(rows: float) -> Any:
    """Return the axes of a plot of rows, with the same space around one row as around forty.

    Args:
      rows: number of rows, with the space between them. They are at 0, 1, …, the first at the bottom.
    """
    axes = plot_axes(8, 0.8 + 0.25 * (rows + 0.5))
    axes.set_ylim(-0.75, rows - 0.25)
    axes.tick_params(labelsize=8.5)
    return axes


def blank(text: str) -> str:
    """Return what stands in the place of a picture that cannot be shown: a square with the escaped reason."""
    return f'<div class="blank">{html.escape(text)}</div>'


def sample_name(name: str) -> str:
    """Return the name of a sample for below its picture: its end, and all of it where the pointer rests."""
    end = "/".join(name.split("/")[-2:])
    shown = _breakable(end if end == name else f"…/{end}")
    return f'<span class="note" title="{html.escape(name)}">{shown}</span>'


def _breakable(text: str) -> str:
    """Return escaped text that a browser breaks into lines after / and _ rather than within a word."""
    return re.sub("[/_]", r"\g<0><wbr>", html.escape(text))


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
