"""MkDocs hook: replace links to files outside docs/ by their text, because the site does not contain these files."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with each `[text](../path)` replaced by `text`."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)
