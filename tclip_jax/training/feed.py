"""The batches of a run, on its devices, and the list of what was bad in them."""

from __future__ import annotations

import jax
from etils import epath
from jax.sharding import Mesh

from tclip_jax.data.bad_samples import BadSamples
from tclip_jax.data.sources import Source, digest
from tclip_jax.data.teacher_cache import TeacherCache
from tclip_jax.parallel.failures import together
from tclip_jax.parallel.gather import gather_json
from tclip_jax.parallel.prefetch import DevicePrefetch
from tclip_jax.training.batches import Batches
from tclip_jax.training.config import RunConfig
from tclip_jax.training.data import train_data


def open_feed(
    run: RunConfig, source: Source, workdir: epath.PathLike, mesh: Mesh, cache: TeacherCache | None = None
) -> tuple[Batches, BadSamples]:
    """The batches of a run from its source as global arrays, and the bad samples, which go to bad_samples.jsonl.

    Every process has a list of its own, that of process p > 0 is bad_samples.p.jsonl. A collective.

    Raises:
      FileNotFoundError, ValueError: the data are not there, do not fit the configuration, or are not the same on every
        process.
    """
    process = jax.process_index()
    with together():
        own = digest(source)
    digests = gather_json(own)
    if other := next((i for i, each in enumerate(digests) if each != digests[0]), None):
        raise ValueError(
            f"{run.data.source}: process {other} sees other data than process 0 ({digests[other]}, not {digests[0]}); "
            "make its files those of the others, or readable (docs/data.md)"
        )
    name = f"bad_samples.{process}.jsonl" if process else "bad_samples.jsonl"
    bad = BadSamples(epath.Path(workdir) / name, run.data.max_bad_share, len(source))

    def start() -> DevicePrefetch:
        rows = train_data(run, source, process_index=process, process_count=jax.process_count(), cache=cache, bad=bad)
        return DevicePrefetch(rows, mesh)

    return Batches(start), bad
