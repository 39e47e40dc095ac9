"""Convert captioned images to ArrayRecord files of TensorFlow Datasets, part by part, on one machine or many.

    <out>/<name>/1.0.0/
      <name>-<split>.array_record-00000-of-00020   tf.train.Examples with image, captions and key; one file per part
      prepared/<split>/plan.json                   the source of each part
      prepared/<split>/00000.json                  the outcome of a part, written after its file
      dataset_info.json, features.json             written last; TFDS needs them to read the data set

A part whose outcome exists is not written again, so a repeated call resumes after an interruption.
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
from tclip_jax.log import in_workers
from tclip_jax.storage import atomic_local_file, write_atomic

VERSION = "1.0.0"
_EXAMPLES = 5  # reasons kept for each kind of dropped sample


@dataclasses.dataclass(frozen=True)
class Part:
    """The samples of one output file.

    Attributes:
      source: the source of the samples.
      content: digest of the content of the source (`sources.digest`) or of its tar.
      start, stop: the range [start, stop) of samples; None for all to the end.
    """

    source: str
    content: str
    start: int = 0
    stop: int | None = None


@dataclasses.dataclass
class Outcome:
    """The result of writing one part, or of all parts.

    Attributes:
      samples: samples read.
      kept: samples written.
      num_bytes: total size of their tf.train.Examples.
      file_bytes: size of the file.
      dropped: kind of fault -> dropped samples.
      examples: (kind, reason) of the first dropped samples of each kind.
      notes: files that the sources skip.
    """

    samples: int = 0
    kept: int = 0
    num_bytes: int = 0
    file_bytes: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def drop(self, error: BadSample) -> None:
        """Count a dropped sample."""
        count = self.dropped.get(error.kind, 0)
        self.dropped[error.kind] = count + 1
        if count < _EXAMPLES:
            self.examples.append((error.kind, str(error)))


@dataclasses.dataclass(frozen=True)
class Target:
    """The data set to write.

    Attributes:
      folder: folder of this version of the data set.
      name: name of the data set.
      split: split to write.
      files: number of files of the split.
    """

    folder: str
    name: str
    split: str
    files: int

    def file(self, part: int) -> epath.Path:
        """Return the path of the file of a part."""
        return epath.Path(self.folder) / f"{self.name}-{self.split}.array_record-{part:05}-of-{self.files:05}"

    @property
    def notes(self) -> epath.Path:
        """The folder of the plan and of the outcomes."""
        return epath.Path(self.folder) / "prepared" / self.split

    def outcome(self, part: int) -> Outcome | None:
        """Return the outcome of a part, or None if its file is missing or incomplete."""
        record, file = self.notes / f"{part:05}.json", self.file(part)
        if not record.exists() or not file.exists():
            return None
        outcome = Outcome(**json.loads(record.read_text()))
        return outcome if file.stat().length == outcome.file_bytes else None


def features() -> tfds.features.FeaturesDict:
    """Return the features of a tf.train.Example: the encoded image, all captions, and the key."""
    text = tfds.features.Text()
    image = tfds.features.Image(shape=(None, None, 3))
    return tfds.features.FeaturesDict({"image": image, "captions": tfds.features.Sequence(text), "key": text})


def plan(spec: str, split: str, samples: int) -> tuple[Part, ...]:
    """Divide a source into parts.

    Args:
      spec: the source; each tar of `wds:<pattern>` becomes one part.
      split: split of the source.
      samples: samples per part of any other source.

    Raises:
      ValueError: the source has classes instead of captions.
    """
    kind, _, argument = spec.partition(":")
    if kind == "wds":
        tars = find_files(argument)
        digests = contents(tars, total=len(tars))
        return tuple(Part(f"wds:{tar}", content) for tar, content in zip(tars, digests, strict=True))
    source = open_source(spec, split)
    if source.classnames:
        raise ValueError(f"{spec}: its images have classes, not captions: use `tfds build` instead")
    total, content = len(source), digest(source)
    return tuple(Part(spec, content, start, min(start + samples, total)) for start in range(0, total, samples))


def begin(out: epath.PathLike, name: str, split: str, parts: Sequence[Part]) -> Target:
    """Create the folder of the data set and write the plan, or check the existing plan.

    Args:
      out: folder of data sets.
      name: name of the data set.
      split: split to write.
      parts: its parts, as `plan` returns them.

    Raises:
      ValueError: TFDS does not accept the name, there are no samples, or the folder holds a data set made from others.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"the name {name!r} must start with a lower-case letter, then letters, digits, underscores")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", split):
        raise ValueError(f"the split {split!r} must start with a lower-case letter, then letters, digits, underscores")
    if not parts:
        raise ValueError(f"{name}: there are no samples to prepare")
    target = Target(str(epath.Path(out) / name / VERSION), name, split, len(parts))
    path, planned = target.notes / "plan.json", [dataclasses.asdict(part) for part in parts]
    if not path.exists():
        target.notes.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(planned, indent=0))
    elif (existing := json.loads(path.read_text())) != planned:
        pairs = [(i, *pair) for i, pair in enumerate(zip(existing, planned, strict=False)) if pair[0] != pair[1]]
        reason = f"it has {len(existing):,} parts, not {len(planned):,}"
        if pairs:
            number, old, new = pairs[0]
            reason = f"part {number} was written by an older version, which recorded no content"
            if isinstance(old, dict):
                reason = f"part {number} of {new['source']}: {keys.difference(old, new)}"
        raise ValueError(
            f"{path}: this data set is made from other samples ({reason}): choose another name, split or folder"
        )
    return target


def prepare_part(target: Target, number: int, part: Part) -> Outcome:
    """Write the file of a part and then its outcome, unless both exist."""
    if done := target.outcome(number):
        return done
    source = open_source(part.source, target.split)
    outcome = Outcome(notes=notes(source))
    with atomic_local_file(target.file(number)) as name:
        # Groups of one record, so that reading a sample reads no other.
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
    """Write the metadata of TFDS for all complete splits.

    Returns:
      The total outcome of this split.

    Raises:
      FileNotFoundError: a part is missing.
      ValueError: no sample is good.
    """
    total, splits = Outcome(), []
    for folder in sorted(target.notes.parent.iterdir()):
        if not (folder / "plan.json").exists():  # `begin` of this split was interrupted
            continue
        files = len(json.loads((folder / "plan.json").read_text()))
        split = dataclasses.replace(target, split=folder.name, files=files)
        outcomes = [split.outcome(part) for part in range(files)]
        done = [outcome for outcome in outcomes if outcome]
        if split == target:
            if len(done) < files:
                raise FileNotFoundError(
                    f"{split.file(outcomes.index(None))}: missing; rerun the same command to resume"
                )
            total = _sum(done)
        if len(done) == files and any(outcome.kept for outcome in done):
            splits.append(_split_info(split, done))
    if not total.kept:
        raise ValueError(f"{target.folder}: not one of {total.samples} samples is good: {total.dropped}")
    tfds.folder_dataset.write_metadata(
        data_dir=target.folder, features=features(), split_infos=splits, version=VERSION, check_data=False
    )
    return total


def prepare(target: Target, parts: Sequence[Part], *, workers: int) -> Outcome:
    """Write every part in worker processes on this machine, then the metadata.

    Args:
      target: the data set, from `begin`.
      parts: its parts.
      workers: number of worker processes.

    Returns:
      The total outcome.

    Raises:
      OSError: a worker was killed.
      ValueError: no sample is good.
    """
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(max(workers, 1), context, in_workers()) as pool,
        tqdm.tqdm(total=len(parts), unit="file", desc="prepare", disable=not sys.stderr.isatty()) as bar,
    ):
        futures = [pool.submit(prepare_part, target, number, part) for number, part in enumerate(parts)]
        dropped = 0
        try:
            for future in concurrent.futures.as_completed(futures):
                dropped += future.result().samples - future.result().kept
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
    # The features of an Example are an unordered map; a fixed order makes the files of two runs equal.
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
    """Write every part in an Apache Beam pipeline, then the metadata.

    Args:
      target: the data set, from `begin`; every worker must have access to its folder.
      parts: its parts.
      options: options of the pipeline, such as `--runner=DataflowRunner`.

    Returns:
      The total outcome.

    Raises:
      ValueError: Apache Beam is not installed, or no sample is good.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ValueError(f"Apache Beam is not installed ({error}): pip install 'tclip-jax[beam]'") from None

    with apache_beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        pending = [(number, part) for number, part in enumerate(parts) if target.outcome(number) is None]
        numbered = pipeline | apache_beam.Create(pending, reshuffle=True)
        numbered | apache_beam.MapTuple(lambda number, part: (prepare_part(target, number, part), None)[1])
    return finish(target)
