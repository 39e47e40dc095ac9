"""The validation loss: the training objective over held-out image-caption pairs."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
import numpy.typing as npt
import tqdm
from jax.sharding import Mesh

from tclip_jax.data.pipeline import TrainRow
from tclip_jax.data.sources import FAULTS, digest, open_source
from tclip_jax.data.tokenizer import TextTokenizer
from tclip_jax.parallel.agreement import allgather_json
from tclip_jax.parallel.mesh import shard_batch
from tclip_jax.runs.config import EvalConfig, RunConfig
from tclip_jax.training.build import Build
from tclip_jax.training.tokenizer import run_tokenizer

_THREADS = 2  # that load batches
_COLUMNS = ("image", "tokens", "weight", "fault")


class ValidationLoss:
    """The losses of the configuration and `batch_accuracy`, in float32, as means over the pairs of a held-out source.

    A contrastive loss depends on the pairs of its batch. So the batches are always the same: the pairs in a fixed
    random order, `batch_size` at a time; the last batch is smaller. The result is the mean over pairs that are not
    masked. It does not depend on the number of devices, because rows that fill up a batch are masked. Images are not
    augmented; of several captions or templates, a fixed one is drawn. With a teacher cache, which has no embeddings of
    held-out images, only losses without a teacher count.

    Args:
      config: source, split, templates and batch size of the evaluation.
      run: the run, for its preprocessing and tokenizer.
      tokenizer: the run's tokenizer; None: that of `run_tokenizer`.
      pairs: the most pairs, the first in the random order; 0 for all.

    Raises:
      FileNotFoundError, ValueError: the data are missing or empty.
    """

    def __init__(
        self, config: EvalConfig, run: RunConfig, tokenizer: TextTokenizer | None = None, *, pairs: int = 0
    ) -> None:
        self._config = config
        self._source = open_source(config.source, config.split)
        if not len(self._source):
            raise ValueError(f"{config.source}: it has no sample in its split {config.split!r}")
        self._row = TrainRow(self._source, tokenizer or run_tokenizer(run), run.preprocess, "none", config.templates)
        self._pairs = min(pairs or len(self._source), len(self._source))
        self._checked = False

    def __call__(self, params: Any, build: Build, teacher_params: Any) -> tuple[dict[str, float], dict[str, int]]:
        """Return the metrics of the student's parameters `clip` and `heads`, and the masked samples by kind of fault.

        A collective.

        Raises:
          ValueError: no pair can be used, the loss is not finite, or processes read different data.
        """
        self._check_content()
        step, first = build.jitted_loss, jax.process_index() == 0
        sums, faults = Counter[str](), Counter[str]()

        def add(metrics: dict[str, Any]) -> None:
            metrics = jax.device_get(metrics)
            counts, pairs = metrics.pop("faults"), float(metrics.pop("pairs"))
            faults.update({kind: int(counts[i]) for i, kind in enumerate(FAULTS) if i})
            if pairs:
                sums.update({"pairs": pairs} | {name: pairs * float(value) for name, value in metrics.items()})

        pending: dict[str, Any] = {}
        shown = first and sys.stderr.isatty()
        with tqdm.tqdm(total=self._pairs, unit="pair", desc="validation", disable=not shown, leave=False) as bar:
            for batch in self._batches(build.mesh):
                with jax.default_matmul_precision("highest"):
                    running = step(params, batch, teacher_params)
                if pending:  # the devices compute the next batch meanwhile
                    add(pending)
                pending = running
                bar.update(min(self._config.batch_size, self._pairs - bar.n))
        add(pending)
        pairs = sums.pop("pairs", 0.0)
        failed = {kind: count for kind, count in faults.items() if count}
        if not pairs:
            raise ValueError(f"no usable pair: {', '.join(f'{count:,} x {kind}' for kind, count in failed.items())}")
        means = {name: sums[name] / pairs for name in sorted(sums, key=lambda name: (name != "loss", name))}
        if not np.isfinite(means["loss"]):
            raise ValueError(f"the loss is {means['loss']}")
        return means, failed

    def _batches(self, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
        """Yield global batches of a fixed shape; masked rows fill up each to a multiple of the number of devices."""
        order = np.random.default_rng(0).permutation(len(self._source))[: self._pairs]
        size = self._config.batch_size
        rows = -(-size // mesh.size) * mesh.size
        local = rows // jax.process_count()
        start = jax.process_index() * local
        empty = {name: np.zeros_like(value) for name, value in self._row.draw(0, np.random.default_rng(0)).items()}

        def load(number: int) -> dict[str, npt.NDArray[Any]]:
            indices = order[number * size : (number + 1) * size][start : start + local]
            drawn = [self._row.draw(int(i), np.random.default_rng((0, int(i)))) for i in indices]
            filled = drawn + [empty] * (local - len(drawn))
            return {name: np.stack([row[name] for row in filled]) for name in _COLUMNS}

        numbers = grain.MapDataset.range(-(-len(order) // size))
        for batch in numbers.map(load).to_iter_dataset(grain.ReadOptions(_THREADS, 2 * _THREADS)):
            yield shard_batch(batch, mesh)

    def _check_content(self) -> None:
        """Raise ValueError, once and on all processes, if the processes read different data."""
        if self._checked:
            return
        contents = allgather_json(digest(self._source)) if jax.process_count() > 1 else [""]
        if process := next((i for i, each in enumerate(contents) if each != contents[0]), None):
            raise ValueError(f"process {process} reads different data than process 0")
        self._checked = True
