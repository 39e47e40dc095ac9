"""Render a batch as an HTML page of the images and captions that the model receives."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tclip_jax.data.tokenizer import EOT, Tokenizer
from tclip_jax.pages import data_uri, page, paragraph, table

_SMALL = 64  # longer side in pixels; smaller images are enlarged without interpolation


def contact_sheet(title: str, batch: Mapping[str, npt.NDArray[Any]], facts: Sequence[tuple[str, str]]) -> str:
    """Return an HTML page of a batch, with every image and the caption that its tokens decode to.

    Args:
      title: title of the page.
      batch: `image` (B, H, W, 3) uint8, `tokens` (B, T) int32 and `weight` (B,) float32.
      facts: (name, value) rows of the table at the top of the page.
    """
    tokens, weight = batch["tokens"], batch["weight"]
    tokenizer = Tokenizer(tokens.shape[1])
    lengths = (tokens == EOT).argmax(axis=1) + 1
    good = weight > 0
    rows = [*facts, ("samples", f"{len(weight):,}"), ("of weight 0", f"{(~good).sum():,}")]
    if good.any():
        mean, std = (f(batch["image"][good], axis=(0, 1, 2)) / 255 for f in (np.mean, np.std))
        rows += [("mean of R, G, B", _numbers(mean)), ("their standard deviation", _numbers(std))]
        full = (lengths[good] == tokens.shape[1]).mean()
        rows.append((f"captions that fill all {tokens.shape[1]} tokens", f"{full:.1%}"))
    cards = "".join(
        _card(image, tokenizer.decode(row), length, bool(is_good))
        for image, row, length, is_good in zip(batch["image"], tokens, lengths, good, strict=True)
    )
    note = paragraph("Input of the model: pixels after augmentation, captions after tokenization.", "note")
    return page(title, f'{note}{table(rows, header=False)}<div class="cards">{cards}</div>')


def _card(pixels: npt.NDArray[np.uint8], caption: str, length: int, is_good: bool) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    small = ' class="small"' if max(pixels.shape[:2]) < _SMALL else ""
    picture = f'<img{small} alt="" src="{data_uri(buffer.getvalue(), "png")}">'
    words = f"{html.escape(caption)}<br>{length} tokens" if is_good else '<span class="bad">bad: weight 0</span>'
    return f"<figure>{picture}<figcaption>{words}</figcaption></figure>"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
