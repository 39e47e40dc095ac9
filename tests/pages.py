"""A parsed HTML page, for tests of pages."""

from __future__ import annotations

import base64
import html.parser
import io
from collections.abc import Collection

from PIL import Image


class Page(html.parser.HTMLParser):
    """The content of a page, which must not have a tag in `forbidden`.

    Attributes:
      tags: (tag, attributes) of every element.
      words: the pieces of text between tags.
      addresses: everything that a browser would load.
    """

    def __init__(self, page: str, forbidden: Collection[str] = ("link", "script", "iframe", "b")) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self._forbidden = forbidden
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in self._forbidden
        self.tags.append((tag, dict(attrs)))
        addresses = [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.addresses += [address for address in addresses if not address.startswith("#")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    def pictures(self) -> list[Image.Image]:
        """The embedded images, decoded; every address must be one."""
        pictures = []
        for address in self.addresses:
            kind, _, data = address.partition(";base64,")
            assert kind.startswith("data:image/")
            pictures.append(Image.open(io.BytesIO(base64.b64decode(data))))
            pictures[-1].load()
        return pictures
