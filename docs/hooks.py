"""For MkDocs: a page's links to other files of the repository, which are no pages of the site, become their text."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`[text](../path)` as `text`."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)
