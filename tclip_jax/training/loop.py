"""The training loop, for full-precision and ternary models, with and without a teacher, on one device or many."""

from __future__ import annotations

import ml_collections
from etils import epath

from tclip_jax.data.file_tokenizer import FileTokenizer
from tclip_jax.inference.model import Model
from tclip_jax.training.session import Session, prepare


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> Model:
    """Train to `config.steps`, resuming from the newest whole checkpoint in `workdir` if there is one.

    Writes to `workdir`: config.json (resolved), history.jsonl (changes at each restart), checkpoints/, metrics.jsonl,
    tensorboard/, bad_samples.jsonl if there are bad samples, and heartbeats/ with several processes. The metrics of a
    step are written before its checkpoint. A refused start writes nothing.

    Args:
      config: a recipe's configuration, see `tclip_jax.runs.config`.
      workdir: a local folder or a gs:// path, the same for all processes.

    Returns:
      The trained model, with latent weights.

    Raises:
      FileNotFoundError: data, a teacher or initial weights do not exist.
      ValueError: the configuration is invalid, `workdir` holds a run of another model, a checkpoint cannot be written,
        too many steps in a row were skipped, too many samples are bad, or evaluations fail repeatedly. With several
        processes, all raise the error of one.
      Stopped: a process received SIGTERM or SIGINT; the state is saved.
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
    stored = prepared.tokenizer if isinstance(prepared.tokenizer, FileTokenizer) else None
    return Model(run.model, run.preprocess, state.params["clip"], run.rules, stored)
