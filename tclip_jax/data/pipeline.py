"""The training pipeline: a source of records becomes batches, shuffled, augmented and divided among processes.

The global order of rows depends on the source and the seed alone. Process p of P takes rows p, p + P, p + 2P, …, so the
global batches are the same on any number of processes and workers, and after any restart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import grain
import numpy as np
from absl import flags
from PIL import Image

from tclip_jax import keys
from tclip_jax.data import images, prompts
from tclip_jax.data.augment import AUGMENTATIONS
from tclip_jax.data.bad_samples import BadSamples
from tclip_jax.data.embedding_store import TeacherCache, copy_generator
from tclip_jax.data.images import Preprocess
from tclip_jax.data.sources import FAULTS, BadSample, Record, Source, described
from tclip_jax.data.sources.base import Fault
from tclip_jax.data.sources.remote import retry
from tclip_jax.data.tokenizer import TextTokenizer

Batch = dict[str, np.ndarray]

_MAX_RECORDS = 2**32  # of Grain's shuffle
_MAX_CAPTION = 2**16  # characters: far more than any context holds
_NAME_BYTES, _REASON_BYTES = 256, 160


def train_iterator(
    source: Source,
    *,
    tokenizer: TextTokenizer,
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
    """Return the endless training batches of one process.

    A batch is a dict with B = batch_size / process_count rows: `image` (B, H, W, 3) uint8, `tokens` (B, T) int32,
    `weight` (B,) float32 and `fault` (B,) int32. A read that fails is retried. A sample that cannot be read is masked:
    its row is zeros with weight 0, and `fault` is its index in `FAULTS` (0 for good samples).

    Args:
      source: the records.
      tokenizer: captions to tokens.
      preprocess: the size of the images, and their normalisation on the device.
      augment: a name in `AUGMENTATIONS`.
      templates: prompts for labelled sources, as `templates_for` takes them; each draw picks one at random.
      batch_size: rows over all processes.
      seed: seeds shuffling, captions and augmentations; 0 <= seed < 2**32.
      process_index, process_count: this process, and how many divide a batch.
      workers: processes that prepare batches; 0 uses threads of this process. Close the iterator to stop them.
      threads: threads in this process or in every worker; each prepares whole batches.
      prefetch: batches kept ready in this process or in every worker.
      cache: teacher embeddings. They join the batch as `teacher_image` and `teacher_text` (B, D) float16, and each row
        repeats the caption and the augmentation that the teacher encoded.
      bad: records the masked samples; None for no record.

    Raises:
      ValueError: `batch_size` is not divisible by `process_count`, `augment` is unknown, the source has no records or
        more than 2³², or the cache has another number of samples.
    """
    if batch_size % process_count:
        raise ValueError(f"global batch {batch_size} is not divisible by {process_count} processes")
    if not 0 < len(source) <= _MAX_RECORDS:
        raise ValueError(f"the source has {len(source) or 'no'} records: 1 to {_MAX_RECORDS:,} can be shuffled")
    if cache is not None and cache.samples != len(source):
        raise ValueError(f"{cache.folder} is of {cache.samples} samples: the source has {len(source)}")
    # Only this order (shuffle, random_map, slice) draws the same global batches for any number of processes.
    return TrainIterator(
        global_order(source, seed).random_map(TrainRow(source, tokenizer, preprocess, augment, templates, cache)),
        key=lambda: keys.recipe(seed=seed, **described(source)),
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        workers=workers,
        threads=threads,
        prefetch=prefetch,
        bad=BadSamples() if bad is None else bad,
    )


class TrainIterator(Iterator[Batch]):
    """An endless iterator over one process's rows of each global batch; its state is a position in the global order.

    The state counts the rows that were yielded, not those prepared ahead. It does not depend on the number of
    processes or workers, nor on the batch size, so all three may change on resume.

    Args:
      rows: the global order.
      key: returns the key of the data (seed and content of the source), which the state carries; called once, when a
        state is first read or set.
      batch_size: rows over all processes.
      process_index, process_count, workers, threads, prefetch: as in `train_iterator`.
      bad: records the masked samples of this process.

    Attributes:
      names, reasons: the names of the samples of the last batch, and why they are masked ("" for good samples), as
        UTF-8 (B,) bytes.
    """

    def __init__(
        self,
        rows: grain.MapDataset,
        *,
        key: Callable[[], keys.Recipe],
        batch_size: int,
        process_index: int,
        process_count: int,
        workers: int,
        threads: int,
        prefetch: int,
        bad: BadSamples,
    ) -> None:
        self._rows, self._key, self._batch_size = rows, functools.cache(key), batch_size
        self._process_index, self._process_count = process_index, process_count
        self._workers, self._options = workers, grain.ReadOptions(threads, max(threads, prefetch))
        self._bad = bad
        self.names = self.reasons = np.zeros(0, "S")
        self._samples = 0
        self._batches: Iterator[Any] | None = None  # the first `next` starts it, and with it the workers

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._start()
        batch = next(self._batches)
        if self._workers:
            # jaxlib keeps what it sends to devices for a while: a copy gives the workers' shared memory back at once.
            batch = {name: np.array(values) for name, values in batch.items()}
        self._samples += self._batch_size
        self.names, self.reasons = batch.pop("name"), batch.pop("reason")
        for row in np.flatnonzero(batch["fault"]):
            name, reason = (bytes(each[row]).decode("utf-8", "replace") for each in (self.names, self.reasons))
            self._bad.add(FAULTS[batch["fault"][row]], name, reason)
        return batch

    def get_state(self) -> dict[str, Any]:
        """Return the number of rows yielded over all processes and the key of the data, as JSON values."""
        return {"samples": self._samples, "data": self._key()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Move to the position of a state.

        Raises:
          ValueError: the state belongs to other data or another seed, or an older version wrote it.
        """
        if not isinstance(state, dict) or "samples" not in state or not isinstance(state.get("data"), dict):
            raise ValueError(
                f'the position in the data is {str(state)[:80]}; expected {{"samples": …, "data": {{…}}}}: an older '
                "version wrote it, without the data's content; start a new run from its weights by config.init"
            )
        if differs := keys.difference(state["data"], self._key()):
            raise ValueError(
                f"the data are not those of the checkpoint ({differs}): restore them, or start a new run from its "
                "weights by config.init"
            )
        self.close()
        self._samples = state["samples"]

    def close(self) -> None:
        """Stop the worker processes."""
        close: Callable[[], None] | None = getattr(self._batches, "close", None)
        if close is not None:
            close()
        self._batches = None

    def _start(self) -> Iterator[Any]:
        share = self._rows[self._samples + self._process_index :: self._process_count]
        # The order is endless, so it has no remainder; to count batches with one, Grain overflows at one row a batch.
        rows = self._batch_size // self._process_count
        dataset = share.batch(rows, drop_remainder=True).to_iter_dataset(self._options)
        if self._workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's workers refuse to start otherwise
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
        return iter(dataset)


def global_order(source: Source, seed: int) -> grain.MapDataset:
    """Return the endless order in which records are drawn, as indices: each part of a mixture in epochs of its own.

    Memory does not grow with the source.
    """
    orders, start = [], 0
    for number, (_, length) in enumerate(parts := getattr(source, "parts", ((1.0, len(source)),))):
        # Rows are drawn by index: the metrics of Grain's source node take a fifth of the time of a small image.
        order = grain.MapDataset.range(start, start + length).seed((seed + number) % 2**32)
        orders.append(order.shuffle().repeat())
        start += length
    return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, [weight for weight, _ in parts]).seed(seed)


class TrainRow(grain.transforms.RandomMap):
    """The transformation of a record's index into a row of a batch."""

    def __init__(
        self,
        source: Source,
        tokenizer: TextTokenizer,
        preprocess: Preprocess,
        augment: str,
        templates: str | Sequence[str],
        cache: TeacherCache | None = None,
    ) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._preprocess = preprocess
        self._name, self._augment = augment, AUGMENTATIONS.find(augment, "the augmentation")
        self._cache = cache
        templates = prompts.templates_for(source, templates) if source.classnames else ()
        # One (templates, T) array for each class: labelled data is tokenized once, here.
        self._class_tokens = [tokenizer(prompts.captions(name, templates)) for name in source.classnames]

    def random_map(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return a row; with a cache, one whose caption and augmentation the teacher has encoded."""
        if self._cache is None:
            return self.draw(index, rng)
        copy = int(rng.integers(self._cache.copies))
        image, text = self._cache.read(index, copy)
        row = self.draw(index, copy_generator(self._cache.seed, index, copy))
        return row | {"teacher_image": image, "teacher_text": text}

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return `image`, `tokens`, `weight` and `fault`, and `name` and, if it is masked, `reason` as bytes."""
        image, tokens = (
            np.zeros((*self._preprocess.size, 3), np.uint8),
            np.zeros(self._tokenizer.context_length, np.int32),
        )
        fault, name, reason = 0, "", ""
        try:
            record = read(self._source, index)
            name = record.name
            tokens, image = self._tokens(record, rng), self._view(record, rng)
        except BadSample as error:
            tokens[:] = 0
            fault, name, reason = FAULTS.index(error.kind), error.name, error.reason
        return {
            "image": image,
            "tokens": tokens,
            "weight": np.float32(not fault),
            "fault": np.int32(fault),
            "name": np.array(name.encode("utf-8", "backslashreplace")[-_NAME_BYTES:], f"S{_NAME_BYTES}"),
            "reason": np.array(reason.encode()[:_REASON_BYTES], f"S{_REASON_BYTES}"),
        }

    def _view(self, record: Record, rng: np.random.Generator) -> np.ndarray:
        try:
            image = _open(record)
        except ValueError as error:
            raise bad_image(record, error) from None
        try:
            view = np.asarray(self._augment(image, rng, self._preprocess))
        except Exception as error:
            try:  # Augmentations decode the image: a broken one is masked, a fault of the augmentation ends the run.
                images.preprocess(images.load(_open(record)), self._preprocess)
            except ValueError as broken:
                raise bad_image(record, broken) from None
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"the augmentation {self._name} fails for {record.name}: {what}") from error
        if view.dtype != np.uint8 or view.shape != (*self._preprocess.size, 3):
            size = (*self._preprocess.size, 3)
            raise ValueError(
                f"the augmentation {self._name} gives {view.dtype} {view.shape}: it must give uint8 {size}"
            )
        return view

    def _tokens(self, record: Record, rng: np.random.Generator) -> np.ndarray:
        if has_class(record, self._source):
            choices = self._class_tokens[record.label]
            return choices[rng.integers(len(choices))]
        captions = [caption for caption in record.captions if caption.strip()]
        if not captions:
            raise BadSample("no_caption", record.name, "no caption and no valid label")
        return self._tokenizer([captions[rng.integers(len(captions))][:_MAX_CAPTION]])[0]


def _open(record: Record) -> Image.Image:
    pixels = record.image
    return images.open_lazily(pixels) if isinstance(pixels, bytes) else Image.fromarray(pixels)


def read(source: Source, index: int) -> Record:
    """Return `source[index]`; retry while the file system or network fails.

    Raises:
      BadSample: the record cannot be read.
    """
    return retry(lambda: source[index], f"record {index}", OSError)


def has_class(record: Record, source: Source) -> bool:
    """Whether the label indexes the source's class names, from which captions can be made."""
    return isinstance(record.label, (int, np.integer)) and 0 <= record.label < len(source.classnames)


def bad_image(record: Record, error: ValueError) -> BadSample:
    """Return the error for a record whose image cannot be decoded."""
    kind: Fault = "too_many_pixels" if isinstance(error, images.TooManyPixels) else "corrupt_image"
    return BadSample(kind, record.name, str(error))
