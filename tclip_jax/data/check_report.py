"""What a check of a source found, as text and as JSON."""

from __future__ import annotations

from typing import Any

from tclip_jax.data.check import Findings, quantile
from tclip_jax.pages import aligned

_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
_MEASURES = {
    "short_sides": "shorter side, pixels",
    "long_sides": "longer side, pixels",
    "image_kib": "image, KiB",
    "captions": "captions of an image",
    "tokens": "tokens of a caption",
}


def to_json(found: Findings, context_length: int) -> dict[str, Any]:
    """Every count, the quantiles of what was measured, and the share of captions that `context_length` cuts."""
    fields: dict[str, Any] = dict(vars(found))
    for name in _MEASURES:
        counts = fields.pop(name)
        fields[name] = {f"{share:g}": quantile(counts, share) for share in _QUANTILES}
    return fields | {"good": found.samples - found.broken.total(), "cut_share": cut_share(found, context_length)}


def cut_share(found: Findings, context_length: int) -> float:
    """The share of captions that have more tokens than `context_length`."""
    cut = sum(count for length, count in found.tokens.items() if length > context_length)
    return cut / max(found.tokens.total(), 1)


def to_text(found: Findings, context_length: int) -> str:
    """Tables for people, and a few examples of whatever is wrong."""
    good = found.samples - found.broken.total()
    rows = [["samples", f"{found.samples:,}"], ["good", f"{good:,}"], *_counts("broken: ", found.broken)]
    rows += [*_counts("format: ", found.formats), ["images that are there before", f"{found.duplicates:,}"]]
    rows.append([f"captions cut at {context_length} tokens", f"{cut_share(found, context_length):.2%}"])
    measured = [["", *(f"{share:.0%}" for share in _QUANTILES)]]
    for name, title in _MEASURES.items():
        counts = getattr(found, name)
        measured.append([title, *(f"{quantile(counts, share):,}" for share in _QUANTILES)])
    lines = [*aligned(rows), "", *aligned(measured)] if good else aligned(rows)
    if found.examples:
        lines += ["", "Broken, the first of each kind:", *(f"  {kind}: {reason}" for kind, reason in found.examples)]
    if found.duplicate_examples:
        groups = (", ".join(map(str, group)) for group in found.duplicate_examples)
        lines += ["", "The same image, by number in the source:", *(f"  {group}" for group in groups)]
    if found.notes:
        lines += ["", "Passed over:", *(f"  {note}" for note in found.notes)]
    return "\n".join(lines)


def _counts(prefix: str, counts: Any) -> list[list[str]]:
    return [[f"{prefix}{name}", f"{count:,}"] for name, count in counts.most_common()]
