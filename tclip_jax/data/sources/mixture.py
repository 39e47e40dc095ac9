"""Several sources at once, in given proportions."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence

from tclip_jax.data.sources import open_source
from tclip_jax.data.sources.base import Record, Source, digest, notes
from tclip_jax.data.sources.content import combined

_PART = re.compile(r"(\d+\.?\d*|\.\d+)\*([a-z]+(?::.*)?)")
_PLUS = re.compile(r"\+(?=(?:\d+\.?\d*|\.\d+)\*[a-z]+(?::|\+|$))")


def open_mixture(argument: str, split: str) -> Mixture:
    """The mixture of the sources in `0.7*wds:…+0.3*csv:…`."""
    weights, specs = zip(*parse(argument), strict=True)
    return Mixture(weights, [open_source(spec, split) for spec in specs])


class Mixture:
    """The records of several sources one after the other, to be drawn in the proportions of `parts`.

    Each source keeps an order and epochs of its own: what has more weight than records starts again sooner, and no
    record is drawn twice before all others of its source were. The classes of labelled sources are put in a row.

    Attributes:
      sources: those.
      parts: weight and length of each source; the weights add up to 1.
    """

    def __init__(self, weights: Sequence[float], sources: Sequence[Source]) -> None:
        total = sum(weights)
        self.sources = tuple(sources)
        self._stops = tuple(itertools.accumulate(len(source) for source in sources))
        self._first_label = (0, *itertools.accumulate(len(source.classnames) for source in sources))
        self.parts = tuple((weight / total, len(source)) for weight, source in zip(weights, sources, strict=True))
        self.notes = [note for source in sources for note in notes(source)]
        self.classnames = tuple(name for source in sources for name in source.classnames)

    @functools.cached_property
    def digest(self) -> str:
        """Of the shares and the contents of the sources."""
        shares = [share for share, _ in self.parts]
        return combined(f"{share}*{digest(source)}" for share, source in zip(shares, self.sources, strict=True))

    @property
    def templates(self) -> tuple[str, ...] | None:
        """What all labelled parts state alike, or None.

        Raises:
          ValueError: they differ.
        """
        stated = {getattr(source, "templates", None) for source in self.sources if source.classnames}
        if len(stated) > 1:
            raise ValueError("the parts of the mixture state other templates than each other: say which are to be used")
        return next(iter(stated), None)

    def __len__(self) -> int:
        return self._stops[-1]

    def __getitem__(self, index: int) -> Record:
        part = bisect.bisect_right(self._stops, index)
        record = self.sources[part][index - (self._stops[part - 1] if part else 0)]
        if not self.sources[part].classnames:
            return record
        if not isinstance(record.label, int):
            raise ValueError(f"{record.name}: images of several classes cannot be mixed with others")
        valid = 0 <= record.label < len(self.sources[part].classnames)
        return dataclasses.replace(record, label=record.label + self._first_label[part] if valid else -1)


def parse(argument: str) -> list[tuple[float, str]]:
    """The weights and specs in `0.7*wds:…+0.3*csv:…`; a `+` parts only where a weight and a `*` follow.

    Raises:
      ValueError: a part without a weight above 0.
    """
    parts = []
    for part in _PLUS.split(argument):
        match = _PART.fullmatch(part)
        if not match or not float(match[1]):
            raise ValueError(f"mixture:{argument}: {part!r} is not WEIGHT*SOURCE with a weight above 0")
        parts.append((float(match[1]), match[2]))
    return parts
