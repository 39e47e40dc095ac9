"""The start of a run: initial weights, or a checkpoint and the changes of the configuration that it allows."""

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
from tclip_jax.ternary import QuantizedTensor


def start_params(run: RunConfig, mesh: Mesh) -> tuple[Any, dict[str, Any] | None]:
    """Return the initial parameters by `config.init` or `config.inherit`, over `mesh`, and their origin.

    Both are None if neither key is set. Raises the errors of `initial_weights`, `load_known` and `inherit_params`.
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
    """Return the latent float32 weights (NumPy) that `config.init` selects.

    Float weights, also those of a run, become latent weights unchanged. Ternary weights, also those that a foreign
    checkpoint stores as floats equal to scale · trit, depend on `config.init_scales`. "keep" finds latent weights that
    give bit-identical trits and scales in the first step. "recompute" takes scale · trit as latent weights, from which
    the quantizer computes new scales; a group in which at least 2/k of the weights are nonzero then becomes all zeros.

    Args:
      run: the configuration.
      source: the loaded source, if it is loaded already.

    Raises:
      FileNotFoundError: the source does not exist.
      ValueError: the source has another shape, activation or pixel statistics, or ternary weights that the rules of the
        run cannot reproduce; the error names the first.
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
    # Learned scales are dropped if the run has none of the same size. A ternary patch embedding is stored as a matrix.
    matching = {path: leaf for path, leaf in leaves.items() if leaf.size == math.prod(shapes.get(path, (0,)))}
    reshaped = {path: leaf.reshape(shapes[path]) for path, leaf in matching.items()}
    return with_learned_scales(unflatten_dict(reshaped, sep="/"), run.rules)


def _check_same(run: RunConfig, source: Stored) -> None:
    """Raise ValueError for the first difference of the models or their pixel statistics."""
    pixels = (("mean", source.preprocess.mean, run.preprocess.mean), ("std", source.preprocess.std, run.preprocess.std))
    theirs, ours = (flatten_dict(dataclasses.asdict(config), sep=".") for config in (source.config, run.model))
    model = [(f"model {option}", theirs[option], ours[option]) for option in theirs]
    for option, its, wanted in (*model, *((f"preprocess {name}", its, wanted) for name, its, wanted in pixels)):
        if its != wanted:
            raise ValueError(f"config.init {run.init}: its {option} is {its}, the run's is {wanted}")


def _recovered(params: dict[str, Any], rules: TernaryRules) -> dict[str, Any]:
    """Return `params` with a `TernaryTensor` for every float weight that has a rule and equals scale · trit."""
    leaves = flatten(params)
    for path in leaves.keys() & {*TERNARIZABLE}:
        quantizer = find_quantizer(path, rules)
        if quantizer and not quantizer.uniform and not isinstance(leaves[path], QuantizedTensor):
            with contextlib.suppress(NotTernaryError):
                leaves[path] = recover_parameter(path, leaves[path])
    return unflatten_dict(leaves, sep="/")


def _floats(leaf: Any) -> Any:
    return np.asarray(leaf.dequantize() if isinstance(leaf, QuantizedTensor) else leaf, np.float32)


# Keys that must not change in a run.
_FIXED = ("model", "ternary", "quantizer", "seed", "init", "init_scales", "inherit")
# Keys that do not change the weights, except by rounding of sums in another order.
_FREE = (
    *(
        "mesh.",
        "devices.",
        "checkpoint.",
        "eval.",
        "evals",
        "remat",
        "attention",
        "telemetry_every",
        "log_every",
        "max_skipped_steps",
    ),
    *("stall_minutes", "stall_exit", "compile_cache", "profile_steps", "wandb_project", "software.", "plugins."),
    *("data.workers", "data.microbatches", "data.max_bad_share", "data.tokenizer"),
)
_PATHS = ("teacher.source", "data.source", "data.teacher_cache")  # their contents are compared instead

_logger = logging.getLogger(__name__)


class Resume:
    """The changes of the configuration since earlier starts in the workdir. A collective; only `begin` writes files.

    Args:
      config: the configuration.
      workdir: workdir of the run.
      step: the step that is resumed, 0 for a new run.
      data: {"source", "split", "samples", "content"} of the training data.
      teacher: {"source", "content", …} of the teacher, or None.
      init: {"source", "content", …} of the initial weights, or None.
      plugins: the plug-ins of the run, as `RunConfig.plugins`.
      devices: the devices, as of `device_record`.

    Attributes:
      changed: the changed keys, as {key: [old, new]}.

    Raises:
      ValueError: a key that must not change has changed, or all steps are done and a key that affects the weights has
        changed.
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
        plugins: dict[str, dict[str, str]] | None = None,
        devices: dict[str, Any] | None = None,
    ) -> None:
        self._workdir, self._step = epath.Path(workdir), step
        resolved = json.loads(config.to_json())
        self._record: Record = {
            "config": resolved, "data": data, "teacher": teacher, "init": init, "software": software(),
            "plugins": plugins or {}, "devices": devices or {},
        }  # fmt: skip
        self.changed: Changes = decided(lambda: self._compare(resolved))

    def begin(self) -> None:
        """Write config.json and history.jsonl, and log the start and the changes, on process 0."""
        if jax.process_index() == 0:
            steps = f"{self._record['config']['steps']:,}"
            start = f"resumed from step {self._step:,} of {steps}" if self._step else f"a new run of {steps} steps"
            _logger.info("%s: %s", self._workdir, start)
            for key, values in self.changed.items():
                _logger.info("%s from step %d", in_words({key: values}), self._step)
            write_record(self._workdir, self._record, self._step, self.changed)

    def _compare(self, resolved: dict[str, Any]) -> Changes:
        history, path = read_history(self._workdir), self._workdir / CONFIG
        if not history:
            return {}
        previous = record_at(history, self._step)
        before = _with_defaults(previous["config"])
        if fixed := changes({key: before[key] for key in _FIXED}, {key: resolved[key] for key in _FIXED}):
            key, (old, new) = next(iter(fixed.items()))
            raise ValueError(f"{path}: this run has config.{key} = {old}, not {new}: choose another workdir")
        if not self._step:
            return {}
        if self._record["init"] is None:
            self._record["init"] = previous.get("init")
        names = ("data", "teacher", "software", "plugins", "devices")
        parts = {name: previous.get(name) for name in names if previous.get(name)}
        changed = changes(_merged(before, parts), _merged(resolved, self._record))
        steps = resolved["steps"]
        if self._step > steps:
            raise ValueError(f"{path}: this run has done {self._step} steps, more than config.steps = {steps}")
        affecting = {
            key: values
            for key, values in changed.items()
            if not key.startswith(_FREE) and not (key in _PATHS and all(values))
        }
        if self._step == steps and affecting:
            raise ValueError(
                f"{path}: this run has done all its {steps} steps with other values: {in_words(affecting)}; raise"
                " config.steps to continue with the new values, or choose another workdir"
            )
        return changed


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Return a stored configuration with the defaults of keys that did not exist when it was written."""
    base = json.loads(base_config().to_json())
    whole = ("model", "preprocess")
    return {
        key: {**default, **config.get(key, {})}
        if isinstance(default, dict) and key not in whole
        else config.get(key, default)
        for key, default in base.items()
    }


def _merged(config: dict[str, Any], record: Record) -> dict[str, Any]:
    """Return the configuration and the record as one mapping, with both under `data` and `teacher`."""
    data = {**config["data"], **{key: each for key, each in (record.get("data") or {}).items() if key != "source"}}
    teacher = {"source": config["teacher"], "content": (record.get("teacher") or {}).get("content")}
    return {
        **config,
        "data": data,
        "teacher": teacher,
        "software": record.get("software") or {},
        "plugins": record.get("plugins") or {},
        "devices": record.get("devices") or {},
    }
