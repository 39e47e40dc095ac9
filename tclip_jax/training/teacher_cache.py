"""The teacher cache: computes a teacher's embeddings of the training data, and checks that a cache fits a run."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath
from jax.sharding import Mesh

from tclip_jax import keys
from tclip_jax.data import prompts
from tclip_jax.data.augment import AUGMENTATIONS, DRAWS
from tclip_jax.data.bad_samples import BadSamples
from tclip_jax.data.embedding_store import Embeddings, TeacherCache, copy_generator
from tclip_jax.data.file_tokenizer import FileTokenizer
from tclip_jax.data.pipeline import TrainRow
from tclip_jax.data.sources import FAULTS, Source, described, open_source
from tclip_jax.data.tokenizer import TextTokenizer
from tclip_jax.inference.load import load_known
from tclip_jax.inference.model import Model
from tclip_jax.models.clip import CLIP
from tclip_jax.parallel.agreement import allgather_json, together
from tclip_jax.parallel.mesh import batch_sharding, make_mesh
from tclip_jax.parallel.sharding import tree_shardings
from tclip_jax.runs.config import RunConfig
from tclip_jax.training.objective import Encoders, check_teacher
from tclip_jax.training.tokenizer import check_teacher_tokenizer, run_tokenizer

_THREADS = 4  # threads that decode images, and batches that are prefetched
_NAMED = ("name", "reason")  # of a bad sample, in a row

_logger = logging.getLogger(__name__)


def write_cache(
    folder: epath.PathLike, run: RunConfig, teacher: str, *, copies: int, batch_size: int = 128, file_rows: int = 4096
) -> TeacherCache:
    """Embed every sample of `run.data` `copies` times, resuming where an earlier call stopped. A collective.

    A few batches of images and one file of embeddings are in memory at a time. With several processes, each writes
    different files from its own devices. They share the folder, and wait for each other after every file.

    Args:
      folder: the cache, new or incomplete.
      run: its data, augmentation, preprocessing, context length and seed determine the teacher's inputs.
      teacher: a run, an artifact or a foreign checkpoint, see `load_model`.
      copies: augmentations of each sample, at least 1.
      batch_size: images that the teacher encodes at a time.
      file_rows: embeddings per file.

    Raises:
      ValueError: the teacher does not fit the run's images or texts, or the folder holds another cache.
    """
    if copies < 1:
        raise ValueError(f"copies is {copies}: it must be at least 1")
    mesh = make_mesh(devices=jax.local_devices())
    (model, origin), source = load_known(teacher, mesh), open_source(run.data.source, run.data.split)
    check_teacher(model.config, run.model, run.loss)
    tokenizer = run_tokenizer(run, teacher=teacher)
    check_teacher_tokenizer(teacher, model.config.text, model.tokenizer, tokenizer)
    cache = TeacherCache(
        str(folder),
        teacher,
        run.data.source,
        model.config.embed_dim,
        model.logit_scale,
        len(source),
        copies,
        run.seed,
        file_rows,
        keys.recipe(teacher=origin["content"], **describe_inputs(run, source, tokenizer)),
    )
    cache.write_manifest()
    # The missing files, as process 0 sees them, are divided evenly, whichever process wrote the others.
    missing = allgather_json([file for file in range(cache.files) if not _is_whole(cache, file)])[0]
    assigned = missing[jax.process_index() :: jax.process_count()]
    bad = BadSamples()
    embedded = _embed(cache, assigned, model, train_row(run, source, tokenizer), mesh, batch_size, bad)
    rows = sum(len(cache.rows_of(file)) for file in assigned)
    hidden = jax.process_index() > 0 or not sys.stderr.isatty()
    with tqdm.tqdm(total=rows, unit="sample", desc="teacher", disable=hidden) as bar:
        for _ in range(0, len(missing), jax.process_count()):
            # Processes wait for each other after every file: a wait of hours at the end would count as a lost process.
            with together():
                for file, embeddings in itertools.islice(embedded, 1):
                    cache.write(file, embeddings)
                    bar.update(len(embeddings))
    if news := bad.news():
        _logger.warning("%s", news)
    return TeacherCache.open(folder)


def open_cache(run: RunConfig, source: Source | None = None, tokenizer: TextTokenizer | None = None) -> TeacherCache:
    """Return the cache of a run, after a comparison of its inputs with those of the run.

    Args:
      run: the configuration.
      source: the run's data; None skips the comparison of the data, as in a plan.
      tokenizer: the run's tokenizer; None skips its comparison.

    Raises:
      FileNotFoundError: the cache does not exist, or is incomplete.
      ValueError: the cache is damaged, or has other inputs than the run.
    """
    cache = TeacherCache.open(run.data.teacher_cache)
    wanted = describe_inputs(run, source, tokenizer)
    if differs := keys.difference({name: cache.made_by.get(name) for name in wanted}, wanted):
        raise ValueError(f"{run.data.teacher_cache}: the teacher's inputs differ ({differs}): make another cache")
    return cache


def describe_inputs(
    run: RunConfig, source: Source | None = None, tokenizer: TextTokenizer | None = None
) -> keys.Recipe:
    """Return the recipe of a teacher's inputs, without the seed: augmentation, preprocessing, and data if `source`.

    A `tokenizer` is named if it is not CLIP's own.
    """
    pixels = dataclasses.asdict(run.preprocess)
    opened: dict[str, Any] = {}
    if source is not None:
        captions = prompts.templates_for(source, run.data.templates) if source.classnames else ()
        opened = {"data": described(source), "templates": captions}
    return keys.recipe(
        augment=run.data.augment,
        draws=DRAWS,
        **({"augment_plugin": plugin} if (plugin := AUGMENTATIONS.plugin(run.data.augment)) else {}),
        context_length=run.model.text.context_length,
        **({"tokenizer": tokenizer.digest} if isinstance(tokenizer, FileTokenizer) else {}),
        **{name: pixels[name] for name in ("size", "interpolation", "resize_mode")},
        **opened,
    )


def train_row(run: RunConfig, source: Source, tokenizer: TextTokenizer) -> TrainRow:
    """Return the function that makes a training row of a sample."""
    return TrainRow(source, tokenizer, run.preprocess, run.data.augment, run.data.templates)


def _is_whole(cache: TeacherCache, file: int) -> bool:
    try:
        cache.check(file)
    except (FileNotFoundError, ValueError):
        return False
    return True


def _embed(
    cache: TeacherCache,
    files: Sequence[int],
    model: Model,
    row: TrainRow,
    mesh: Mesh,
    batch_size: int,
    bad: BadSamples,
) -> Iterator[tuple[int, Embeddings]]:
    """Yield each file with its embeddings, float16 (rows, 2, D), computed on the devices of this process."""
    size = -(-batch_size // mesh.size) * mesh.size
    encoders = Encoders(CLIP(model.config, model.rules), model.preprocess.mean, model.preprocess.std)
    encode = jax.jit(lambda params, batch: jnp.stack(encoders(params, batch)[:2], axis=1))
    params = jax.device_put(model.params, tree_shardings(model.params, mesh))
    batches = _batches(cache, files, row, size, bad)
    for file in files:
        count = len(cache.rows_of(file))
        parts = [encode(params, jax.device_put(next(batches), batch_sharding(mesh))) for _ in range(0, count, size)]
        embeddings = np.concatenate(parts)[:count].astype(np.float16)
        if not np.isfinite(embeddings).all():
            raise ValueError(f"{cache.teacher}: this teacher's embeddings are not finite: use another teacher")
        yield file, embeddings


def _batches(
    cache: TeacherCache, files: Sequence[int], row: TrainRow, size: int, bad: BadSamples
) -> Iterator[dict[str, Any]]:
    """Yield batches of `image` and `tokens` with `size` rows, file after file; zeros pad the last batch of a file."""
    parts = [rows[i : i + size] for rows in map(cache.rows_of, files) for i in range(0, len(rows), size)]

    def load(number: int) -> dict[str, Any]:
        drawn = []
        for row_number in parts[number]:
            copy, index = divmod(row_number, cache.samples)
            each = row.draw(index, copy_generator(cache.seed, index, copy))
            if each["fault"]:
                bad.add(FAULTS[each["fault"]], *(each[name].item().decode("utf-8", "replace") for name in _NAMED))
            drawn.append(each)
        stacked = {name: np.stack([each[name] for each in drawn]) for name in ("image", "tokens")}
        return {name: np.pad(x, [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)]) for name, x in stacked.items()}

    return iter(grain.MapDataset.range(len(parts)).map(load).to_iter_dataset(grain.ReadOptions(_THREADS, _THREADS)))
