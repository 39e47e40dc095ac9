"""Read a source once and report broken samples, sizes of images and captions, and duplicate images."""

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
from tclip_jax.data.tokenizer import TextTokenizer, Tokenizer
from tclip_jax.log import in_workers
from tclip_jax.pages import aligned

_CHUNK = 1024  # samples per task of a worker process
_EXAMPLES = 5  # shown of each kind of fault, and of duplicates
# A 128-bit digest of an encoded image. Among a billion images, equal digests mean equal images.
_DIGEST = np.dtype([("high", "<u8"), ("low", "<u8"), ("index", "<i8")])
_BUCKETS = 256


@dataclasses.dataclass
class Findings:
    """The report on a source, or on a part of it. Counters count good samples, except `broken`.

    Attributes:
      samples: number of samples read.
      broken: kind of fault -> broken samples.
      examples: (kind, reason) of the first broken samples of each kind.
      formats: format and mode, such as "JPEG RGB" -> images.
      short_sides, long_sides: length in pixels -> images.
      image_kib: size of the encoded image in KiB -> images.
      captions: number of captions of an image -> images.
      tokens: length in tokens, with special tokens, before truncation and padding -> captions.
      duplicates: images that equal an earlier image byte for byte.
      duplicate_examples: names of the samples of the largest groups of equal images.
      notes: files that the source skips, and its assumptions.
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
    duplicate_examples: list[list[str]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, part: Findings) -> None:
        """Add the counts and examples of another part of the source."""
        shown = Counter(kind for kind, _ in self.examples)
        for kind, reason in part.examples:
            if shown[kind] < _EXAMPLES:
                self.examples.append((kind, reason))
            shown[kind] += 1
        self.samples += part.samples
        for name in ("broken", "formats", "short_sides", "long_sides", "image_kib", "captions", "tokens"):
            getattr(self, name).update(getattr(part, name))


def check(spec: str, split: str, *, workers: int, tokenizer: TextTokenizer | None = None) -> Findings:
    """Read every sample of a source once.

    Memory does not grow with the source: the digests of images go to 256 files, which are sorted one at a time.

    Args:
      spec: the source, such as "wds:<pattern>" or "tfds:<name>".
      split: its split.
      workers: number of worker processes.
      tokenizer: counts the tokens of captions; None for CLIP's.

    Returns:
      The counts and examples of the whole source.
    """
    source = open_source(spec, split)
    total, findings = len(source), Findings(notes=notes(source))
    chunks = [(start, min(start + _CHUNK, total)) for start in range(0, total, _CHUNK)]
    with contextlib.ExitStack() as stack:
        buckets = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        context = multiprocessing.get_context("spawn")
        pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(max(workers, 1), context, in_workers()))
        bar = stack.enter_context(tqdm.tqdm(total=total, unit="sample", desc="check", disable=not sys.stderr.isatty()))
        pending: list[concurrent.futures.Future[tuple[Findings, npt.NDArray[np.void]]]] = []
        for start, stop in chunks:
            pending.append(pool.submit(check_part, spec, split, start, stop, tokenizer))
            # Bound the queue of results: a billion samples are a million chunks.
            while len(pending) > (4 * workers if stop < total else 0):
                part, digests = pending.pop(0).result()
                findings.add(part)
                _to_buckets(digests, buckets)
                bar.update(part.samples)
                bar.set_postfix_str(f"{findings.broken.total():,} broken", refresh=False)
        findings.duplicates, groups = _count_duplicates(buckets)
    findings.duplicate_examples = [[source[index].name for index in group] for group in groups]
    return findings


def check_part(
    spec: str, split: str, start: int, stop: int, tokenizer: TextTokenizer | None = None
) -> tuple[Findings, npt.NDArray[np.void]]:
    """Read the samples [start, stop). Args are those of `check`.

    Returns:
      The counts of these samples, without duplicates, and the digests of their good images, a `_DIGEST` array.
    """
    source, findings = _source(spec, split), Findings(samples=stop - start)
    digests, texts = np.zeros(stop - start, _DIGEST), list[str]()
    good = 0
    for index in range(start, stop):
        try:
            record, image = examine(source, index, captioned=False)
        except BadSample as error:
            findings.broken[error.kind] += 1
            if findings.broken[error.kind] <= _EXAMPLES:
                findings.examples.append((error.kind, str(error)))
            continue
        data = record.image if isinstance(record.image, bytes) else record.image.tobytes()
        digest = np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), "<u8")
        digests[good] = (*digest, index)
        good += 1
        findings.formats[f"{image.format or 'pixels'} {image.mode}"] += 1
        findings.short_sides[min(image.size)] += 1
        findings.long_sides[max(image.size)] += 1
        findings.image_kib[len(data) >> 10] += 1
        findings.captions[len(record.captions)] += 1
        texts += record.captions
    if texts:
        findings.tokens.update((tokenizer or Tokenizer()).lengths(texts))
    return findings, digests[:good]


@functools.cache
def _source(spec: str, split: str) -> Source:
    return open_source(spec, split)


def quantile(counts: Counter[int], share: float) -> int:
    """Return the smallest value v such that a fraction of at least `share` of the items is <= v; 0 without items."""
    cumulative, total = 0, counts.total()
    for value in sorted(counts):
        cumulative += counts[value]
        if cumulative >= share * total:
            return value
    return 0


def _to_buckets(digests: npt.NDArray[np.void], folder: pathlib.Path) -> None:
    """Append each digest to the file of its bucket, so that equal digests are in one file."""
    buckets = digests["high"] % _BUCKETS
    for bucket in np.unique(buckets):
        with open(folder / str(bucket), "ab") as file:
            file.write(digests[buckets == bucket].tobytes())


def _count_duplicates(folder: pathlib.Path) -> tuple[int, list[list[int]]]:
    """Return how many digests in the files of `folder` equal another, and the indices of the largest groups."""
    duplicates, groups = 0, list[list[int]]()
    for path in folder.iterdir():
        rows = np.sort(np.fromfile(path, _DIGEST))
        is_first = np.append(True, (rows["high"][1:] != rows["high"][:-1]) | (rows["low"][1:] != rows["low"][:-1]))
        starts = np.flatnonzero(is_first)
        sizes = np.diff(np.append(starts, len(rows)))
        duplicates += len(rows) - len(starts)
        largest = np.argsort(-sizes, kind="stable")[:_EXAMPLES]
        groups += [_indices(rows, starts[i], sizes[i]) for i in largest if sizes[i] > 1]
    return duplicates, sorted(groups, key=lambda group: (-len(group), group))[:_EXAMPLES]


def _indices(rows: npt.NDArray[np.void], start: int, size: int) -> list[int]:
    return np.sort(rows["index"][start : start + size])[:_EXAMPLES].tolist()


_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
_MEASURES = {
    "short_sides": "shorter side, pixels",
    "long_sides": "longer side, pixels",
    "image_kib": "image, KiB",
    "captions": "captions per image",
    "tokens": "tokens per caption",
}


def to_json(findings: Findings, context_length: int) -> dict[str, Any]:
    """Return the counts, the quantiles of sizes, and the fraction of captions longer than `context_length` tokens."""
    fields: dict[str, Any] = dict(vars(findings))
    for name in _MEASURES:
        counts = fields.pop(name)
        fields[name] = {f"{share:g}": quantile(counts, share) for share in _QUANTILES}
    return fields | {
        "good": findings.samples - findings.broken.total(),
        "cut_share": cut_share(findings, context_length),
    }


def cut_share(findings: Findings, context_length: int) -> float:
    """Return the fraction of captions that have more tokens than `context_length`."""
    cut = sum(count for length, count in findings.tokens.items() if length > context_length)
    return cut / max(findings.tokens.total(), 1)


def to_text(findings: Findings, context_length: int) -> str:
    """Format the findings as tables, with examples of broken and duplicate samples."""
    good = findings.samples - findings.broken.total()
    rows = [["samples", f"{findings.samples:,}"], ["good", f"{good:,}"], *_counts("broken: ", findings.broken)]
    rows += [*_counts("format: ", findings.formats), ["duplicates of an earlier image", f"{findings.duplicates:,}"]]
    rows.append([f"captions cut at {context_length} tokens", f"{cut_share(findings, context_length):.2%}"])
    measured = [["", *(f"{share:.0%}" for share in _QUANTILES)]]
    for name, title in _MEASURES.items():
        counts = getattr(findings, name)
        measured.append([title, *(f"{quantile(counts, share):,}" for share in _QUANTILES)])
    lines = [*aligned(rows), "", *aligned(measured)] if good else aligned(rows)
    if findings.examples:
        lines += ["", "Broken, the first of each kind:", *(f"  {kind}: {reason}" for kind, reason in findings.examples)]
    if findings.duplicate_examples:
        groups = (", ".join(group) for group in findings.duplicate_examples)
        lines += ["", "Equal images, the largest groups:", *(f"  {group}" for group in groups)]
    if findings.notes:
        lines += ["", "Skipped by the source:", *(f"  {note}" for note in findings.notes)]
    return "\n".join(lines)


def _counts(prefix: str, counts: Any) -> list[list[str]]:
    return [[f"{prefix}{name}", f"{count:,}"] for name, count in counts.most_common()]


def examine(source: Source, index: int, *, captioned: bool = True) -> tuple[Record, Image.Image]:
    """Read one sample and decode its image.

    Args:
      source: where the sample is read.
      index: index of the sample.
      captioned: whether the sample needs a caption; otherwise a valid class label is enough.

    Raises:
      BadSample: the sample is broken; training would mask it.
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
