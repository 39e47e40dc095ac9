"""From a source of records to batches of NumPy arrays, the same on any number of hosts and after any restart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from PIL import Image

from tclip_jax import keys
from tclip_jax.data import images, prompts
from tclip_jax.data.augment import AUGMENTATIONS
from tclip_jax.data.bad_samples import BadSamples
from tclip_jax.data.embedding_store import TeacherCache, copy_generator
from tclip_jax.data.images import Preprocess
from tclip_jax.data.iterator import NAME_BYTES, REASON_BYTES, TrainIterator
from tclip_jax.data.sources import FAULTS, BadSample, Record, Source, described
from tclip_jax.data.sources.base import Fault
from tclip_jax.data.sources.remote import retry
from tclip_jax.data.tokenizer import Tokenizer

_MAX_RECORDS = 2**32  # of Grain's shuffle
_MAX_CAPTION = 2**16  # characters: far more than any context holds
_evaluated = BadSamples()


def train_iterator(
    source: Source,
    *,
    tokenizer: Tokenizer,
    preprocess: Preprocess,
    augment: str,
    templates: str | Sequence[str],
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 4,
    cache: TeacherCache | None = None,
    bad: BadSamples | None = None,
) -> TrainIterator:
    """Endless shuffled, augmented batches: this process's share of each global batch.

    Each batch is a dict of `image` (B, H, W, 3) uint8, `tokens` (B, T) int32, `weight` (B,) float32 and `fault` (B,)
    int32 with B = batch_size / process_count. A bad sample keeps its place as zeros of weight 0; `fault` says what is
    wrong with it, as its place in `FAULTS`, and 0 of all others. What cannot be read is tried again before it is bad.

    Row j of process p is row p + j * process_count of the batch a single process would get, down to the augmentation.
    The state holds a place in the global order alone, so it fits any number of processes and workers.

    Args:
      templates: for labelled sources, as of `templates_for`; each draw takes one at random.
      batch_size: rows over all processes.
      seed: of the shuffling, the captions and the augmentations, 0 <= seed < 2**32.
      workers: processes that prepare batches; 0 for threads in this one. Close the iterator to end them.
      threads: threads in this process or in every worker, each preparing a batch of its own.
      prefetch: batches kept ready in this process or in every worker.
      cache: a teacher's embeddings, which are added to the batch as `teacher_image` and `teacher_text` (B, D) float16;
        the captions and augmentations are then those that it was made of.
      bad: lists the bad samples; by default they are logged.

    Raises:
      ValueError: `batch_size` is not divisible by `process_count`, `augment` is unknown, the source has no records or
        more than 2³², or the cache is of another number of samples.
    """
    _check_shares(batch_size, process_count)
    if augment not in AUGMENTATIONS:
        raise ValueError(f"unknown augmentation {augment!r}: choose one of {', '.join(AUGMENTATIONS)}")
    if not 0 < len(source) <= _MAX_RECORDS:
        raise ValueError(f"the source has {len(source) or 'no'} records: 1 to {_MAX_RECORDS:,} can be shuffled")
    if cache is not None and cache.samples != len(source):
        raise ValueError(f"{cache.folder} is of {cache.samples} samples: the source has {len(source)}")
    # Only this order (shuffle, random_map, slice) draws the same global batches whatever the number of processes.
    return TrainIterator(
        global_order(source, seed).random_map(TrainRow(source, tokenizer, preprocess, augment, templates, cache)),
        made_of=lambda: keys.recipe(seed=seed, **described(source)),
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        workers=workers,
        threads=threads,
        prefetch=prefetch,
        bad=BadSamples() if bad is None else bad,
    )


def global_order(source: Source, seed: int) -> grain.MapDataset:
    """The endless order in which the records of a source are drawn, by their index: epoch after epoch of each part.

    Nothing as long as the source is ever in memory.
    """
    orders, start = [], 0
    for number, (_, length) in enumerate(parts := getattr(source, "parts", ((1.0, len(source)),))):
        # Rows are drawn by index because Grain's own source node costs a fifth of the time of a small image in metrics.
        order = grain.MapDataset.range(start, start + length).seed((seed + number) % 2**32)
        orders.append(order.shuffle().repeat())
        start += length
    return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, [weight for weight, _ in parts]).seed(seed)


def eval_batches(
    source: Source,
    *,
    preprocess: Preprocess,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    prefetch: int = 4,
) -> Iterator[dict[str, Any]]:
    """Every record once, in order, in batches of one shape: this process's rows of each, which lie side by side.

    Yields dicts of `image` (B, H, W, 3) uint8, `label` (B,) or (B, C) int32 (-1 where there is none), `weight` (B,)
    float32, `index` (B,) int32, the place in the source, and lists of B: `captions`, each a tuple of strings, and
    `name`; B is batch_size / process_count. Bad samples are zeros of weight 0; so are the rows that
    fill up the last batch, whose index is -1.

    Raises:
      ValueError: `batch_size` is not divisible by `process_count`.
    """
    _check_shares(batch_size, process_count)
    share = batch_size // process_count

    def load(number: int) -> dict[str, Any]:
        start = number * batch_size + process_index * share
        rows = [_eval_row(source, i, preprocess) for i in range(start, min(start + share, len(source)))]
        return _pad_and_stack(rows, preprocess, share)

    batches = grain.MapDataset.range(-(-len(source) // batch_size)).map(load)
    return iter(batches.to_iter_dataset(grain.ReadOptions(threads, max(threads, prefetch))))


def _check_shares(batch_size: int, process_count: int) -> None:
    if batch_size % process_count:
        raise ValueError(f"global batch {batch_size} is not divisible by {process_count} processes")


class TrainRow(grain.transforms.RandomMap):
    """Turns the index of a record into one row of a batch."""

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        preprocess: Preprocess,
        augment: str,
        templates: str | Sequence[str],
        cache: TeacherCache | None = None,
    ) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._preprocess = preprocess
        self._augment = augment
        self._cache = cache
        templates = prompts.templates_for(source, templates) if source.classnames else ()
        # One (templates, T) array per class: labelled data is tokenized here and never again.
        self._class_tokens = [tokenizer(prompts.captions(name, templates)) for name in source.classnames]

    def random_map(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """The row, with one of the caption and augmentations that a teacher has seen if there is a cache."""
        if self._cache is None:
            return self.draw(index, rng)
        copy = int(rng.integers(self._cache.copies))
        image, text = self._cache.read(index, copy)
        row = self.draw(index, copy_generator(self._cache.seed, index, copy))
        return row | {"teacher_image": image, "teacher_text": text}

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """`image`, `tokens`, `weight` and `fault` of a record, and the `name` and `reason` of a bad one as bytes."""
        image, tokens = (
            np.zeros((*self._preprocess.size, 3), np.uint8),
            np.zeros(self._tokenizer.context_length, np.int32),
        )
        fault, name, reason = 0, "", ""
        try:
            record = read(self._source, index)
            tokens, image = self._tokens(record, rng), self._view(record, rng)
        except BadSample as error:
            tokens[:] = 0
            fault, name, reason = FAULTS.index(error.kind), error.name, error.reason
        return {
            "image": image,
            "tokens": tokens,
            "weight": np.float32(not fault),
            "fault": np.int32(fault),
            "name": np.array(name.encode()[-NAME_BYTES:], f"S{NAME_BYTES}"),
            "reason": np.array(reason.encode()[:REASON_BYTES], f"S{REASON_BYTES}"),
        }

    def _view(self, record: Record, rng: np.random.Generator) -> np.ndarray:
        pixels = record.image
        try:
            image = images.open_lazily(pixels) if isinstance(pixels, bytes) else Image.fromarray(pixels)
            return AUGMENTATIONS[self._augment](image, rng, self._preprocess)
        except ValueError as error:
            raise bad_image(record, error) from None

    def _tokens(self, record: Record, rng: np.random.Generator) -> np.ndarray:
        if has_class(record, self._source):
            choices = self._class_tokens[record.label]
            return choices[rng.integers(len(choices))]
        captions = [caption for caption in record.captions if caption.strip()]
        if not captions:
            raise BadSample("no_caption", record.name, "no caption and no valid label")
        return self._tokenizer([captions[rng.integers(len(captions))][:_MAX_CAPTION]])[0]


def read(source: Source, index: int) -> Record:
    """`source[index]`, tried again where the system fails to read it.

    Raises:
      BadSample: there is no such record.
    """
    return retry(lambda: source[index], f"record {index}", OSError)


def has_class(record: Record, source: Source) -> bool:
    """Whether the label is one of the source's classes, whose name can then stand for captions."""
    return isinstance(record.label, (int, np.integer)) and 0 <= record.label < len(source.classnames)


def bad_image(record: Record, error: ValueError) -> BadSample:
    """The fault of a record whose image cannot be decoded."""
    kind: Fault = "too_many_pixels" if isinstance(error, images.TooManyPixels) else "corrupt_image"
    return BadSample(kind, record.name, str(error))


def _eval_row(source: Source, index: int, preprocess: Preprocess) -> dict[str, Any]:
    image, weight, record = np.zeros((*preprocess.size, 3), np.uint8), 0, Record(b"", (), -1, f"record {index}")
    try:
        record = read(source, index)
        image, weight = images.preprocess(to_pil(record.image), preprocess), 1
    except ValueError as error:
        bad = error if isinstance(error, BadSample) else bad_image(record, error)
        _evaluated.add(bad.kind, bad.name, bad.reason)
    return {
        "image": image,
        "label": record.label,
        "weight": weight,
        "index": index,
        "captions": record.captions,
        "name": record.name,
    }


def _pad_and_stack(rows: list[dict[str, Any]], preprocess: Preprocess, batch_size: int) -> dict[str, Any]:
    # A record that cannot be read does not say that its label would be a vector.
    shape = max((np.shape(row["label"]) for row in rows), default=())
    none, image = np.full(shape, -1), np.zeros((*preprocess.size, 3), np.uint8)
    fill = {"image": image, "label": -1, "weight": 0, "index": -1, "captions": (), "name": ""}
    rows = rows + [fill] * (batch_size - len(rows))
    return {
        "image": np.stack([row["image"] for row in rows]),
        "label": np.array([each if np.shape(each := row["label"]) == shape else none for row in rows], np.int32),
        "weight": np.array([row["weight"] for row in rows], np.float32),
        "index": np.array([row["index"] for row in rows], np.int32),
        "captions": [row["captions"] for row in rows],
        "name": [row["name"] for row in rows],
    }


def to_pil(image: bytes | np.ndarray) -> Image.Image:
    """The image of a record; raises ValueError where it cannot be decoded."""
    return images.decode(image) if isinstance(image, bytes) else Image.fromarray(image)
