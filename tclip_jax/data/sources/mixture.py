"""Several sources, sampled in proportion to their weights."""

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
    """Open the sources in `0.7*wds:…+0.3*csv:…`."""
    weights, specs = zip(*parse(argument), strict=True)
    return Mixture(weights, [open_source(spec, split) for spec in specs])


class Mixture:
    """The records of several sources, concatenated; the input pipeline samples them by the weights in `parts`.

    Each source has its own order and epochs: no record is drawn twice before all others of its source. A source with a
    large weight and few records repeats sooner. The class names of labelled sources are concatenated.

    Attributes:
      sources: the sources.
      parts: weight and length of each source; the weights sum to 1.
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
        """Digest of the weights and the contents of the sources."""
        weights = [weight for weight, _ in self.parts]
        return combined(f"{weight}*{digest(source)}" for weight, source in zip(weights, self.sources, strict=True))

    @property
    def templates(self) -> tuple[str, ...] | None:
        """The templates of the labelled sources, or None.

        Raises:
          ValueError: the labelled sources have different templates.
        """
        templates = {getattr(source, "templates", None) for source in self.sources if source.classnames}
        if len(templates) > 1:
            raise ValueError("the sources of the mixture have different templates: specify the templates to use")
        return next(iter(templates), None)

    def __len__(self) -> int:
        return self._stops[-1]

    def __getitem__(self, index: int) -> Record:
        part = bisect.bisect_right(self._stops, index)
        record = self.sources[part][index - (self._stops[part - 1] if part else 0)]
        if not self.sources[part].classnames:
            return record
        if not isinstance(record.label, int):
            raise ValueError(f"{record.name}: a mixture cannot have images with several classes")
        valid = 0 <= record.label < len(self.sources[part].classnames)
        return dataclasses.replace(record, label=record.label + self._first_label[part] if valid else -1)


def parse(argument: str) -> list[tuple[float, str]]:
    """Return the weights and specs in `0.7*wds:…+0.3*csv:…`. A `+` separates parts only before a weight and a `*`.

    Raises:
      ValueError: a part has no weight above 0.
    """
    parts = []
    for part in _PLUS.split(argument):
        match = _PART.fullmatch(part)
        if not match or not float(match[1]):
            raise ValueError(f"mixture:{argument}: {part!r} is not WEIGHT*SOURCE with a weight above 0")
        parts.append((float(match[1]), match[2]))
    return parts
