"""Where training starts: other weights, or its own checkpoint, and what may have changed since."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from tclip_jax.artifacts.pack import flatten
from tclip_jax.inference.load import Stored, load_known, load_stored
from tclip_jax.interop.checkpoints import is_checkpoint
from tclip_jax.interop.latent import latent_params
from tclip_jax.interop.recover import NotTernaryError, recover_parameter
from tclip_jax.models.clip import param_shapes, with_learned_scales
from tclip_jax.models.inherit import inherit_params
from tclip_jax.models.ternary_rules import TERNARIZABLE, TernaryRules, find_quantizer
from tclip_jax.parallel.sharding import tree_shardings
from tclip_jax.runs.config import RunConfig, base_config
from tclip_jax.runs.record import (
    CONFIG,
    Changes,
    Record,
    changes,
    in_words,
    read_history,
    record_at,
    software,
    write_record,
)
from tclip_jax.runs.steps import decided
from tclip_jax.ternary import TernaryTensor


def start_params(run: RunConfig, mesh: Mesh) -> tuple[Any, dict[str, Any] | None]:
    """What `config.init` or `config.inherit` gives a run, over `mesh`, and its origin; None where neither is set.

    Raises what `initial_weights`, `load_model` and `inherit_params` raise.
    """
    if run.init:
        source = load_stored(run.init)
        start, origin = initial_weights(run, source), dict(source.origin)
    elif run.inherit:
        wider, origin = load_known(run.inherit)
        start = with_learned_scales(inherit_params(wider.params, wider.config, run.model), run.rules)
    else:
        return None, None
    return jax.device_put(start, tree_shardings(start, mesh)), origin


def initial_weights(run: RunConfig, source: Stored | None = None) -> dict[str, Any]:
    """The latent float32 weights (NumPy) that `config.init` gives a run; `source` if it is loaded already.

    Float weights are latent weights, those of another run included. Ternary ones, also where a foreign checkpoint holds
    them as floats that are exactly scale · trit, are treated as `config.init_scales` says: "keep" finds latent weights
    that give the same trits and scales in the first step, to the bit; "recompute" takes scale · trit for the latent
    weights, from which the quantizer makes its own scales (and, where 2/k of a group or more are nonzero, only zeros).

    Raises:
      FileNotFoundError: no such source.
      ValueError: a model of another shape, activation or pixel statistics; ternary weights that the rules of the run do
        not reproduce, naming the first and why; one line.
    """
    source = load_stored(run.init) if source is None else source
    _check_same(run, source)
    params = source.params
    if run.init_scales == "keep":
        if is_checkpoint(run.init):
            params = _recovered(params, run.rules)
        try:
            params = latent_params(params, run.rules)
        except ValueError as error:
            fit = 'make config.ternary and config.quantizer fit, or set config.init_scales = "recompute"'
            raise ValueError(f"config.init {run.init}: {error}; {fit}") from None
    shapes = {path: leaf.shape for path, leaf in flatten(param_shapes(run.model, run.rules)).items()}
    leaves = {path: _floats(leaf) for path, leaf in flatten(params).items()}
    # Learned scales stay where the rules ask for the same; the patch embedding is a matrix only while it is ternary.
    kept = {path: leaf for path, leaf in leaves.items() if leaf.size == math.prod(shapes.get(path, (0,)))}
    reshaped = {path: leaf.reshape(shapes[path]) for path, leaf in kept.items()}
    return with_learned_scales(unflatten_dict(reshaped, sep="/"), run.rules)


def _check_same(run: RunConfig, source: Stored) -> None:
    pixels = (("mean", source.preprocess.mean, run.preprocess.mean), ("std", source.preprocess.std, run.preprocess.std))
    theirs, ours = (flatten_dict(dataclasses.asdict(config), sep=".") for config in (source.config, run.model))
    model = [(f"model {option}", theirs[option], ours[option]) for option in theirs]
    for option, its, wanted in (*model, *((f"preprocess {name}", its, wanted) for name, its, wanted in pixels)):
        if its != wanted:
            raise ValueError(f"config.init {run.init}: its {option} is {its}, that of the run {wanted}")


def _recovered(params: dict[str, Any], rules: TernaryRules) -> dict[str, Any]:
    """With `TernaryTensor` for the floats that have a rule and are exactly scale · trit."""
    leaves = flatten(params)
    for path in TERNARIZABLE:
        if find_quantizer(path, rules) and not isinstance(leaves[path], TernaryTensor):
            with contextlib.suppress(NotTernaryError):
                leaves[path] = recover_parameter(path, leaves[path])
    return unflatten_dict(leaves, sep="/")


def _floats(leaf: Any) -> Any:
    return np.asarray(leaf.dequantize() if isinstance(leaf, TernaryTensor) else leaf, np.float32)


_FIXED = ("model", "ternary", "quantizer", "seed", "init", "init_scales", "inherit")
# Keys that no weight depends on, but for the rounding of sums in another order.
_FREE = (
    *("mesh.", "checkpoint.", "eval.", "evals", "remat", "telemetry_every", "log_every", "max_skipped_steps"),
    *("stall_minutes", "stall_exit", "compile_cache", "profile_steps", "wandb_project", "software."),
    *("data.workers", "data.microbatches", "data.max_bad_share"),
)
_PLACES = ("teacher.source", "data.source", "data.teacher_cache")  # of what is known by its content

_logger = logging.getLogger(__name__)


class Resume:
    """A start of a run, compared with what is in its workdir; a collective. Nothing is written before `begin`.

    Args:
      step: of the checkpoint that is resumed, 0 for none.
      data: {"source", "split", "samples", "content"} of what it trains on.
      teacher, init: {"source", "content", …} of the weights that it learns and starts from, or None.

    Raises:
      ValueError: a key has changed that may not, or one that decides the weights although all steps are done.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: epath.PathLike,
        step: int,
        *,
        data: dict[str, Any],
        teacher: dict[str, Any] | None,
        init: dict[str, Any] | None,
    ) -> None:
        self._workdir, self._step = epath.Path(workdir), step
        resolved = json.loads(config.to_json())
        self._record: Record = {
            "config": resolved, "data": data, "teacher": teacher, "init": init, "software": software()
        }  # fmt: skip
        self.changed: Changes = decided(lambda: self._compare(resolved))

    def begin(self) -> None:
        """Writes config.json and history.jsonl, on process 0, and logs what has changed."""
        if jax.process_index() == 0:
            for key, values in self.changed.items():
                _logger.info("%s from step %d", in_words({key: values}), self._step)
            write_record(self._workdir, self._record, self._step, self.changed)

    def _compare(self, resolved: dict[str, Any]) -> Changes:
        history, path = read_history(self._workdir), self._workdir / CONFIG
        if not history:
            return {}
        kept = record_at(history, self._step)
        was = _complete(kept["config"])
        if fixed := changes({key: was[key] for key in _FIXED}, {key: resolved[key] for key in _FIXED}):
            key, (old, new) = next(iter(fixed.items()))
            raise ValueError(f"{path}: this run has config.{key} = {old}, not {new}: choose another workdir")
        if not self._step:
            return {}
        if self._record["init"] is None:
            self._record["init"] = kept.get("init")
        parts = {name: kept.get(name) for name in ("data", "teacher", "software") if kept.get(name)}
        changed = changes(_named(was, parts), _named(resolved, self._record))
        steps = resolved["steps"]
        if self._step > steps:
            raise ValueError(f"{path}: this run has done {self._step} steps, more than config.steps = {steps}")
        deciding = {
            key: values
            for key, values in changed.items()
            if not key.startswith(_FREE) and not (key in _PLACES and all(values))
        }
        if self._step == steps and deciding:
            raise ValueError(
                f"{path}: this run has done all its {steps} steps with other values: {in_words(deciding)}; raise"
                " config.steps to train on with these, or choose another workdir"
            )
        return changed


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of the keys that are newer than the run."""
    base = json.loads(base_config().to_json())
    whole = ("model", "preprocess", "quantizer")
    return {
        key: {**default, **config.get(key, {})}
        if isinstance(default, dict) and key not in whole
        else config.get(key, default)
        for key, default in base.items()
    }


def _named(config: dict[str, Any], record: Record) -> dict[str, Any]:
    """One mapping of everything: `teacher.source` is the key of the configuration, `teacher.content` its weights."""
    data = {**config["data"], **{key: each for key, each in (record.get("data") or {}).items() if key != "source"}}
    teacher = {"source": config["teacher"], "content": (record.get("teacher") or {}).get("content")}
    return {**config, "data": data, "teacher": teacher, "software": record.get("software") or {}}
