"""Everything in a source read once: what is broken, how large images and captions are, what is there twice."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import multiprocessing
import pathlib
import sys
import tempfile
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import tqdm
from PIL import Image

from tclip_jax.data.eval_batches import to_pil
from tclip_jax.data.pipeline import bad_image, has_class, read
from tclip_jax.data.sources import BadSample, Record, Source, notes, open_source
from tclip_jax.data.tokenizer import EOT, Tokenizer
from tclip_jax.pages import aligned

_CHUNK = 1024  # samples that a process reads at a time
_EXAMPLES = 5  # of each kind of fault, and of duplicates
_LENGTH = 1024  # captions are counted up to this many tokens
# A digest of the image's bytes: 128 bits, so that equal ones among a billion are equal images.
_DIGEST = np.dtype([("high", "<u8"), ("low", "<u8"), ("index", "<i8")])
_BUCKETS = 256


@dataclasses.dataclass
class Findings:
    """What was found in a source or in a part of it.

    Attributes:
      samples: read.
      broken: how many of each kind of fault.
      examples: (kind, reason) of the first few of each kind.
      formats: good images by format and mode, as "JPEG RGB".
      short_sides, long_sides: pixels -> good images.
      image_kib: size of the encoded image in KiB -> good images.
      captions: captions of an image -> good images.
      tokens: length with start and end token, before any cut -> captions of good images.
      duplicates: images beyond the first of those that are the same, byte for byte.
      duplicate_examples: the samples of a few such groups, by their numbers in the source.
      notes: what the source passes over or takes for granted.
    """

    samples: int = 0
    broken: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    formats: Counter[str] = dataclasses.field(default_factory=Counter)
    short_sides: Counter[int] = dataclasses.field(default_factory=Counter)
    long_sides: Counter[int] = dataclasses.field(default_factory=Counter)
    image_kib: Counter[int] = dataclasses.field(default_factory=Counter)
    captions: Counter[int] = dataclasses.field(default_factory=Counter)
    tokens: Counter[int] = dataclasses.field(default_factory=Counter)
    duplicates: int = 0
    duplicate_examples: list[list[int]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Counts what was found in another part."""
        shown = Counter(kind for kind, _ in self.examples)
        for kind, reason in other.examples:
            if shown[kind] < _EXAMPLES:
                self.examples.append((kind, reason))
            shown[kind] += 1
        self.samples += other.samples
        for name in ("broken", "formats", "short_sides", "long_sides", "image_kib", "captions", "tokens"):
            getattr(self, name).update(getattr(other, name))


def check(spec: str, split: str, *, workers: int) -> Findings:
    """Reads every sample of a source once, by as many processes as `workers`.

    Memory does not grow with the source: digests go to files by their first byte, and each is sorted alone.
    """
    source = open_source(spec, split)
    total, found = len(source), Findings(notes=notes(source))
    chunks = [(start, min(start + _CHUNK, total)) for start in range(0, total, _CHUNK)]
    with contextlib.ExitStack() as stack:
        buckets = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        context = multiprocessing.get_context("spawn")
        pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(max(workers, 1), context))
        bar = stack.enter_context(tqdm.tqdm(total=total, unit="sample", desc="check", disable=not sys.stderr.isatty()))
        waiting: list[concurrent.futures.Future[tuple[Findings, npt.NDArray[np.void]]]] = []
        for start, stop in chunks:
            waiting.append(pool.submit(check_part, spec, split, start, stop))
            # No more than a few ahead: a billion samples are a million chunks.
            while len(waiting) > (4 * workers if stop < total else 0):
                part, digests = waiting.pop(0).result()
                found.add(part)
                _to_buckets(digests, buckets)
                bar.update(part.samples)
                bar.set_postfix_str(f"{found.broken.total():,} broken", refresh=False)
        _count_duplicates(buckets, found)
    return found


def check_part(spec: str, split: str, start: int, stop: int) -> tuple[Findings, npt.NDArray[np.void]]:
    """What is found in the samples [start, stop), and the digests of the images."""
    source, found, tokenizer = _source(spec, split), Findings(samples=stop - start), Tokenizer(_LENGTH)
    digests, texts = np.zeros(stop - start, _DIGEST), list[str]()
    good = 0
    for index in range(start, stop):
        try:
            record, image = examine(source, index, captioned=False)
        except BadSample as error:
            found.broken[error.kind] += 1
            if found.broken[error.kind] <= _EXAMPLES:
                found.examples.append((error.kind, str(error)))
            continue
        data = record.image if isinstance(record.image, bytes) else record.image.tobytes()
        digest = np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), "<u8")
        digests[good] = (*digest, index)
        good += 1
        found.formats[f"{image.format or 'pixels'} {image.mode}"] += 1
        found.short_sides[min(image.size)] += 1
        found.long_sides[max(image.size)] += 1
        found.image_kib[len(data) >> 10] += 1
        found.captions[len(record.captions)] += 1
        texts += record.captions
    if texts:
        found.tokens.update(((tokenizer(texts) == EOT).argmax(axis=1) + 1).tolist())
    return found, digests[:good]


@functools.cache
def _source(spec: str, split: str) -> Source:
    return open_source(spec, split)


def quantile(counts: Counter[int], share: float) -> int:
    """The smallest value that at least `share` of what is counted does not exceed; 0 of nothing."""
    seen, total = 0, counts.total()
    for value in sorted(counts):
        seen += counts[value]
        if seen >= share * total:
            return value
    return 0


def _to_buckets(digests: npt.NDArray[np.void], folder: pathlib.Path) -> None:
    numbers = digests["high"] % _BUCKETS
    for bucket in np.unique(numbers):
        with open(folder / str(bucket), "ab") as file:
            file.write(digests[numbers == bucket].tobytes())


def _count_duplicates(folder: pathlib.Path, found: Findings) -> None:
    groups: list[list[int]] = []
    for path in folder.iterdir():
        rows = np.sort(np.fromfile(path, _DIGEST))
        new = np.append(True, (rows["high"][1:] != rows["high"][:-1]) | (rows["low"][1:] != rows["low"][:-1]))
        starts = np.flatnonzero(new)
        sizes = np.diff(np.append(starts, len(rows)))
        found.duplicates += len(rows) - len(starts)
        largest = np.argsort(-sizes, kind="stable")[:_EXAMPLES]
        groups += [_numbers(rows, starts[i], sizes[i]) for i in largest if sizes[i] > 1]
    found.duplicate_examples = sorted(groups, key=lambda group: (-len(group), group))[:_EXAMPLES]


def _numbers(rows: npt.NDArray[np.void], start: int, size: int) -> list[int]:
    return np.sort(rows["index"][start : start + size])[:_EXAMPLES].tolist()


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


def examine(source: Source, index: int, *, captioned: bool = True) -> tuple[Record, Image.Image]:
    """A sample and its decoded image; unless `captioned`, its label may stand for captions.

    Raises:
      BadSample: it would count with weight 0 in training.
    """
    record = read(source, index)
    try:
        image = to_pil(record.image)
    except ValueError as error:
        raise bad_image(record, error) from None
    named = not captioned and has_class(record, source)
    if not named and not any(caption.strip() for caption in record.captions):
        raise BadSample("no_caption", record.name, "no caption" if captioned else "no caption and no valid label")
    return record, image
