"""The preparation of a data set as an Apache Beam pipeline: on Dataflow, Spark, Flink, or processes of one machine.

TFDS's own pipelines sort every Example by the hash of its key through the workers' disks, fail at a key that is there
twice, and begin anew when killed. Here a part is read and written by one worker, and one that is done stays done; the
order of the samples is left to the training, which shuffles them all anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

from tclip_jax.data.prepare import Outcome, Part, Target, finish, prepare_part


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
