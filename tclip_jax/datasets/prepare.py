"""Captioned images of any source as ArrayRecord files of TensorFlow Datasets, part by part, on one machine or many.

    <out>/<name>/1.0.0/
      <name>-<split>.array_record-00000-of-00020   tf.train.Examples with image, captions and key; a file for each part
      prepared/<split>/plan.json                   what each part is made from
      prepared/<split>/00000.json                  what became of it, written after its file
      dataset_info.json, features.json             written last: with them TFDS can read the data set

A part with its .json is never made again, so the same call resumes where an earlier one was killed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import io
import json
import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import tensorflow_datasets as tfds
import tqdm
from array_record.python import array_record_module
from etils import epath
from tensorflow_datasets.core import example_serializer

from tclip_jax import keys
from tclip_jax.data.sources import BadSample, Source, digest, notes, open_source
from tclip_jax.data.sources.content import contents
from tclip_jax.data.sources.patterns import find_files
from tclip_jax.datasets.check import examine
from tclip_jax.storage import atomic_local_file, write_atomic

VERSION = "1.0.0"
_EXAMPLES = 5  # of each kind of what was dropped are kept


@dataclasses.dataclass(frozen=True)
class Part:
    """What becomes one file: the samples [start, stop) of a source, to its end where `stop` is None.

    Attributes:
      content: of the source, as of `sources.digest`, or of its tar.
    """

    source: str
    content: str
    start: int = 0
    stop: int | None = None


@dataclasses.dataclass
class Outcome:
    """What became of one part, or of all.

    Attributes:
      samples: that were read.
      kept: that were written.
      num_bytes: of their Examples.
      file_bytes: of the file.
      dropped: how many of each kind of fault.
      examples: (kind, reason) of the first few of each kind.
      notes: what a few of the sources pass over.
    """

    samples: int = 0
    kept: int = 0
    num_bytes: int = 0
    file_bytes: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def drop(self, error: BadSample) -> None:
        """Counts a bad sample."""
        seen = self.dropped.get(error.kind, 0)
        self.dropped[error.kind] = seen + 1
        if seen < _EXAMPLES:
            self.examples.append((error.kind, str(error)))


@dataclasses.dataclass(frozen=True)
class Target:
    """The data set to write: where, its name, the split, and the number of its files."""

    folder: str
    name: str
    split: str
    files: int

    def file(self, part: int) -> epath.Path:
        """Where the file of a part lies."""
        return epath.Path(self.folder) / f"{self.name}-{self.split}.array_record-{part:05}-of-{self.files:05}"

    @property
    def notes(self) -> epath.Path:
        """The folder of the plan and of what became of each part."""
        return epath.Path(self.folder) / "prepared" / self.split

    def outcome(self, part: int) -> Outcome | None:
        """What became of a part, None if it is still to be made."""
        note, file = self.notes / f"{part:05}.json", self.file(part)
        if not note.exists() or not file.exists():
            return None
        outcome = Outcome(**json.loads(note.read_text()))
        return outcome if file.stat().length == outcome.file_bytes else None


def features() -> tfds.features.FeaturesDict:
    """What an Example holds: the image as it was, every caption, and the key."""
    text = tfds.features.Text()
    image = tfds.features.Image(shape=(None, None, 3))
    return tfds.features.FeaturesDict({"image": image, "captions": tfds.features.Sequence(text), "key": text})


def plan(spec: str, split: str, samples: int) -> tuple[Part, ...]:
    """A part for each tar of a pattern `wds:`, and for every `samples` of another source.

    Raises:
      ValueError: the source has classes instead of captions.
    """
    kind, _, argument = spec.partition(":")
    if kind == "wds":
        tars = find_files(argument)
        found = contents(tars, total=len(tars))
        return tuple(Part(f"wds:{tar}", content) for tar, content in zip(tars, found, strict=True))
    source = open_source(spec, split)
    if source.classnames:
        raise ValueError(f"{spec}: its images have classes, not captions; `tfds build` prepares such data sets")
    total, content = len(source), digest(source)
    return tuple(Part(spec, content, start, min(start + samples, total)) for start in range(0, total, samples))


def begin(out: epath.PathLike, name: str, split: str, parts: Sequence[Part]) -> Target:
    """Makes the folder and writes the plan, or finds the same one.

    Raises:
      ValueError: the name is none that TFDS takes, there is nothing to prepare, or another data set lies there.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"the name {name!r} is not of small letters, digits and underscores, beginning with a letter")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", split):
        raise ValueError(f"the split {split!r} is not of small letters, digits and underscores, as train and test are")
    if not parts:
        raise ValueError(f"{name}: there are no samples to prepare")
    target = Target(str(epath.Path(out) / name / VERSION), name, split, len(parts))
    path, planned = target.notes / "plan.json", [dataclasses.asdict(part) for part in parts]
    if not path.exists():
        target.notes.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(planned, indent=0))
    elif (was := json.loads(path.read_text())) != planned:
        pairs = [(i, *both) for i, both in enumerate(zip(was, planned, strict=False)) if both[0] != both[1]]
        differs = f"it has {len(was):,} parts, not {len(planned):,}"
        if pairs:
            number, old, new = pairs[0]
            differs = f"part {number} was made by an older version, which kept no content"
            if isinstance(old, dict):
                differs = f"part {number} of {new['source']}: {keys.difference(old, new)}"
        raise ValueError(
            f"{path}: this data set is made from other samples ({differs}): choose another name, split or folder"
        )
    return target


def prepare_part(target: Target, number: int, part: Part) -> Outcome:
    """Writes the file of a part, then the note of what became of it; a part that is done is left alone."""
    if done := target.outcome(number):
        return done
    source = open_source(part.source, target.split)
    outcome = Outcome(notes=notes(source))
    with atomic_local_file(target.file(number)) as name:
        # A group of one: reading a sample reads nothing else.
        writer = array_record_module.ArrayRecordWriter(name, "group_size:1")
        for index in range(part.start, len(source) if part.stop is None else part.stop):
            outcome.samples += 1
            try:
                data = _example(source, index)
            except BadSample as error:
                outcome.drop(error)
                continue
            writer.write(data)
            outcome.kept += 1
            outcome.num_bytes += len(data)
        writer.close()
    outcome.file_bytes = target.file(number).stat().length
    write_atomic(target.notes / f"{number:05}.json", json.dumps(dataclasses.asdict(outcome)))
    return outcome


def finish(target: Target) -> Outcome:
    """Writes what TFDS reads first, of every split that is done, and returns the outcome of this one.

    Raises:
      FileNotFoundError: a part is not done.
      ValueError: not one sample is good.
    """
    total, splits = Outcome(), []
    for folder in sorted(target.notes.parent.iterdir()):
        if not (folder / "plan.json").exists():  # a split whose beginning was killed
            continue
        files = len(json.loads((folder / "plan.json").read_text()))
        each = dataclasses.replace(target, split=folder.name, files=files)
        outcomes = [each.outcome(part) for part in range(files)]
        done = [outcome for outcome in outcomes if outcome]
        if each == target:
            if len(done) < files:
                raise FileNotFoundError(
                    f"{each.file(outcomes.index(None))}: not made; the same command resumes with it"
                )
            total = _sum(done)
        if len(done) == files and any(outcome.kept for outcome in done):
            splits.append(_split_info(each, done))
    if not total.kept:
        raise ValueError(f"{target.folder}: not one of {total.samples} samples is good: {total.dropped}")
    tfds.folder_dataset.write_metadata(
        data_dir=target.folder, features=features(), split_infos=splits, version=VERSION, check_data=False
    )
    return total


def prepare(target: Target, parts: Sequence[Part], *, workers: int) -> Outcome:
    """Makes every part by processes of this machine, as many as `workers`, and finishes."""
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(max(workers, 1), context) as pool,
        tqdm.tqdm(total=len(parts), unit="file", desc="prepare", disable=not sys.stderr.isatty()) as bar,
    ):
        made = [pool.submit(prepare_part, target, number, part) for number, part in enumerate(parts)]
        dropped = 0
        try:
            for each in concurrent.futures.as_completed(made):
                dropped += each.result().samples - each.result().kept
                bar.set_postfix_str(f"{dropped:,} dropped", refresh=False)
                bar.update()
        except BrokenProcessPool:
            raise OSError("a worker was killed (out of memory?): rerun the same command with fewer --workers") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return finish(target)


@functools.cache
def _serializer() -> tuple[tfds.features.FeaturesDict, Any]:
    spec = features()
    return spec, example_serializer.ExampleSerializer(spec.get_serialized_info())


def _example(source: Source, index: int) -> bytes:
    record, _ = examine(source, index)
    assert isinstance(record.image, bytes), record.name
    spec, serializer = _serializer()
    values = {"captions": list(record.captions), "key": record.name.rpartition("/")[2]}
    example = serializer.get_tf_example(spec.encode_example({"image": io.BytesIO(record.image), **values}))
    # The features of an Example have no order of their own: without a fixed one no two runs write the same file.
    return example.SerializeToString(deterministic=True)


def _split_info(target: Target, outcomes: Sequence[Outcome]) -> tfds.core.SplitInfo:
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(target.folder),
        dataset_name=target.name,
        split=target.split,
        filetype_suffix="array_record",
    )
    return tfds.core.SplitInfo(
        name=target.split,
        shard_lengths=[outcome.kept for outcome in outcomes],
        num_bytes=sum(outcome.num_bytes for outcome in outcomes),
        filename_template=template,
    )


def _sum(outcomes: Sequence[Outcome]) -> Outcome:
    total, dropped, shown = Outcome(), Counter[str](), Counter[str]()
    for outcome in outcomes:
        total.samples += outcome.samples
        total.kept += outcome.kept
        total.num_bytes += outcome.num_bytes
        total.file_bytes += outcome.file_bytes
        total.notes += [note for note in outcome.notes if len(total.notes) < _EXAMPLES and note not in total.notes]
        dropped.update(outcome.dropped)
        for kind, reason in outcome.examples:
            if shown[kind] < _EXAMPLES:
                total.examples.append((kind, reason))
            shown[kind] += 1
    total.dropped = dict(dropped.most_common())
    return total


def prepare_with_beam(target: Target, parts: Sequence[Part], options: Sequence[str]) -> Outcome:
    """As `prepare`; the folder must be one that every worker sees.

    Args:
      options: of the pipeline, as `--runner=DataflowRunner`.

    Raises:
      ValueError: Apache Beam is not installed.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ValueError(f"Apache Beam is not installed ({error}): pip install 'tclip-jax[beam]'") from None

    with apache_beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        waiting = [(number, part) for number, part in enumerate(parts) if target.outcome(number) is None]
        numbered = pipeline | apache_beam.Create(waiting, reshuffle=True)
        numbered | apache_beam.MapTuple(lambda number, part: (prepare_part(target, number, part), None)[1])
    return finish(target)
