"""The code blocks of README and docs/, and the commands within them."""

from __future__ import annotations

import pathlib
import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))

FILE = re.compile(r"# (\w+\.py)\n")  # starts a block that is a file of this name


class Block(NamedTuple):
    """A fenced block: `language` is "" for one that names none."""

    page: str
    line: int
    language: str
    text: str


def blocks(page: pathlib.Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found, text = [], page.read_text(encoding="utf-8")
    for match in re.finditer(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(str(page.relative_to(ROOT)), line, match[2], match[3]))
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The words of each call of tclip or of a benchmark, after a prompt as `$ ` or `tpu-vm$ ` too; no redirections.

    Lines that end in a backslash go on; so do those within quotes.
    """
    lines = iter(text.splitlines())
    for line in lines:
        match = re.match(r"(?:[\w-]*\$ )?((?:tclip(?! [\w -]+: )|python -m benchmarks\.\w+)(?: .*)?)$", line)
        if not match:
            continue
        call = match[1]
        while True:
            if call.endswith("\\"):
                call = call[:-1] + next(lines)
                continue
            try:
                words = shlex.split(call, comments=True)
            except ValueError:  # a quote is still open
                call += "\n" + next(lines)
                continue
            break
        stop = next((i for i, word in enumerate(words) if word in (">", "|", "&&")), len(words))
        yield words[:stop]
