"""Render a batch as an HTML page of the images and captions that the model receives."""

from __future__ import annotations

import html
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tclip_jax.data.sources import FAULTS
from tclip_jax.data.tokenizer import EOT, TextTokenizer, Tokenizer
from tclip_jax.pages import blank, data_uri, page, paragraph, properties, sample_name

_SMALL = 64  # longer side in pixels; smaller images are enlarged without interpolation


def contact_sheet(
    title: str,
    batch: Mapping[str, npt.NDArray[Any]],
    names: Sequence[str],
    reasons: Sequence[str],
    facts: Sequence[tuple[str, str]],
    tokenizer: TextTokenizer | None = None,
) -> str:
    """Return an HTML page of a batch, with every image, the caption that its tokens decode to, and its name.

    Args:
      title: title of the page.
      batch: `image` (B, H, W, 3) uint8, `tokens` (B, T) int32, `weight` (B,) float32 and `fault` (B,) int32.
      names: names of the samples.
      reasons: why samples are masked; "" for good samples.
      facts: (name, value) rows of the table at the top of the page.
      tokenizer: what made the tokens; None: CLIP's own, whose tokens of a text are counted too.
    """
    tokens, weight = batch["tokens"], batch["weight"]
    tokenizer = tokenizer or Tokenizer(tokens.shape[1])
    counted = isinstance(tokenizer, Tokenizer)  # the end of another tokenizer's texts is not known
    lengths = (tokens == EOT).argmax(axis=1) + 1
    good = weight > 0
    kinds = Counter(FAULTS[fault] for fault in batch["fault"][~good])
    rows = [*facts, ("samples", f"{len(weight):,}"), ("bad", f"{(~good).sum():,}")]
    rows += [(f"bad: {kind}", f"{count:,}") for kind, count in kinds.most_common()]
    if good.any():
        mean, std = (f(batch["image"][good], axis=(0, 1, 2)) / 255 for f in (np.mean, np.std))
        rows += [("mean of R, G, B", _numbers(mean)), ("their standard deviation", _numbers(std))]
    if good.any() and counted:
        full = (lengths[good] == tokens.shape[1]).mean()
        rows.append((f"captions that fill all {tokens.shape[1]} tokens", f"{full:.1%}"))
    cards = "".join(
        _card(image, tokenizer.decode(row) + (f"\n{length} tokens" if counted else ""), name)
        if is_good
        else _bad_card(FAULTS[fault], reason, name)
        for image, row, length, is_good, fault, name, reason in zip(
            batch["image"], tokens, lengths, good, batch["fault"], names, reasons, strict=True
        )
    )
    note = paragraph(
        "Input of the model: pixels after augmentation, captions after tokenization. A bad sample is masked.", "note"
    )
    return page(title, f'{note}{properties(rows)}<div class="cards">{cards}</div>')


def _card(pixels: npt.NDArray[np.uint8], caption: str, name: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    small = ' class="small"' if max(pixels.shape[:2]) < _SMALL else ""
    picture = f'<img{small} alt="" src="{data_uri(buffer.getvalue(), "png")}">'
    words = html.escape(caption).replace("\n", "<br>")
    return f"<figure>{picture}<figcaption>{words}<br>{sample_name(name)}</figcaption></figure>"


def _bad_card(kind: str, reason: str, name: str) -> str:
    return f"<figure>{blank(f'bad: {kind}: {reason}')}<figcaption>{sample_name(name)}</figcaption></figure>"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
