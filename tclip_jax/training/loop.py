"""The training loop: one for full precision and ternary, with and without a teacher, on one device or many."""

from __future__ import annotations

import ml_collections
from etils import epath

from tclip_jax.inference.model import Model
from tclip_jax.training.session import Session, prepare


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> Model:
    """Trains to `config.steps`, resuming from the newest whole checkpoint in `workdir` if there is one.

    Leaves in `workdir`: config.json (resolved), history.jsonl (what was changed when it was resumed), checkpoints/,
    metrics.jsonl, tensorboard/, bad_samples.jsonl where there were any, and of several processes heartbeats/. What
    metrics.jsonl says of a step is there before the step's checkpoint is. A start that is refused writes nothing.

    Returns:
      The trained model, its weights latent.

    Raises:
      ValueError: an impossible configuration, a workdir that holds another model's run, a checkpoint that cannot be
        written, `max_skipped_steps` steps in a row that changed nothing, too many bad samples, or evaluations that fail
        again and again. Of several processes all raise what one did.
      Stopped: it was asked to stop, on any process, and is saved.
    """
    prepared = prepare(config, workdir)
    run = prepared.run
    with Session(prepared) as session:
        state, batch = session.restore(), None
        for step in range(prepared.first_step + 1, run.steps + 1):
            batch = session.next_batch(step, batch)
            state, metrics = session.train_step(step, state, batch)
            stop, late = session.agree()
            session.record(step, metrics, state)
            if stop or session.is_save_due(step, late=late):
                session.save(step, state)
            if stop:
                session.stop(step, stop)
            session.evaluate(step, state)
        session.failure.raise_everywhere()
    return Model(run.model, run.preprocess, state.params["clip"], run.rules)
