"""Student, optimizer, state and jitted step of a run on a mesh, with arrays or with shapes alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tclip_jax.data.embedding_store import TeacherCache
from tclip_jax.data.images import Preprocess
from tclip_jax.data.sources import FAULTS
from tclip_jax.inference.model import Model
from tclip_jax.models.clip import CLIP, param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TernaryRules
from tclip_jax.parallel.mesh import BATCH_AXES, batch_sharding
from tclip_jax.parallel.sharding import tree_shardings
from tclip_jax.runs.config import RunConfig
from tclip_jax.training.objective import Encoders, Objective, check_teacher
from tclip_jax.training.optimizer import make_optimizer, quant_lambda, stop_gradients
from tclip_jax.training.state import TrainState, init_state
from tclip_jax.training.step import make_train_step


class Architecture(NamedTuple):
    """A model without its weights; `rules` selects the ternary ones."""

    config: CLIPConfig
    preprocess: Preprocess
    rules: TernaryRules = ()


def check_batch(run: RunConfig, mesh: Mesh) -> None:
    """Raise ValueError if the global batch is not divisible by the devices, or a device's rows by the microbatches."""
    if run.data.batch_size % mesh.size:
        raise ValueError(f"global batch {run.data.batch_size} is not divisible by {mesh.size} devices")
    rows, parts = run.data.batch_size // math.prod(mesh.shape[axis] for axis in BATCH_AXES), run.data.microbatches
    if rows % parts:
        raise ValueError(
            f"the {rows} rows of a device, of global batch {run.data.batch_size}, are not divisible by"
            f" config.data.microbatches {parts}"
        )


@dataclasses.dataclass(frozen=True)
class Build:
    """A run on a mesh. Call its methods under `jax.set_mesh(mesh)`.

    Attributes:
      run: the configuration.
      mesh: the devices; shapes and compilation also work with devices that this machine does not have.
      teacher: the teacher's model if it runs in the step, a cache of its embeddings, or None.

    Raises:
      ValueError: the teacher does not fit the student, see `check_teacher`.
    """

    run: RunConfig
    mesh: Mesh
    teacher: Model | Architecture | TeacherCache | None

    def __post_init__(self) -> None:
        if isinstance(self.teacher, Model | Architecture):
            check_teacher(self.teacher.config, self.run.model, self.run.loss)

    @functools.cached_property
    def student(self) -> CLIP:
        """The model that is trained."""
        return CLIP(self.run.model, self.run.rules, jnp.dtype(self.run.dtype), self.run.remat)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer of all parameters."""
        return make_optimizer(self.run.optimizer, self.run.steps)

    def init_state(self, start: Any = None) -> TrainState:
        """Return the state at step 0, from the model's parameters `start` or random ones."""
        teacher, averaged = self.teacher, self.run.optimizer.ema_decay > 0
        shape = teacher.embed_dim if isinstance(teacher, TeacherCache) else teacher.config if teacher else None
        return init_state(
            self.student, self.optimizer, self.run.seed, shape, self.mesh, self.run.loss, average=averaged, start=start
        )

    @functools.cached_property
    def state_shapes(self) -> TrainState:
        """The state, with jax.ShapeDtypeStruct leaves that have shardings."""
        return self._sharded(jax.eval_shape(self.init_state))

    @functools.cached_property
    def teacher_shapes(self) -> Any:
        """The teacher's float32 parameters as shapes with shardings; None if no teacher runs in the step."""
        if self.teacher is None or isinstance(self.teacher, TeacherCache):
            return None
        return self._sharded(param_shapes(self.teacher.config, self.teacher.rules))

    @functools.cached_property
    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch of `data.pipeline` as shapes with shardings."""
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "image": ((*self.run.model.vision.image_size, 3), np.uint8),
            "tokens": ((self.run.model.text.context_length,), np.int32),
            "weight": ((), np.float32),
            "fault": ((), np.int32),
        }
        if isinstance(self.teacher, TeacherCache):
            shapes |= dict.fromkeys(("teacher_image", "teacher_text"), ((self.teacher.embed_dim,), np.float16))
        rows, sharding = self.run.data.batch_size, batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)
            for name, (shape, dtype) in shapes.items()
        }

    def jitted_step(self, state: TrainState) -> Any:
        """Return the jitted step (state, batch, teacher's parameters) -> (state, metrics), which donates the state.

        Args:
          state: arrays or shapes, for the shardings of the result.
        """
        step = make_train_step(
            Encoders(self.student, self.run.preprocess.mean, self.run.preprocess.std),
            self._teacher(self.student.dtype),
            self.optimizer,
            self.run.loss,
            quant_lambda(self.run.ternary_warmup_steps),
            self.run.optimizer.ema_decay,
            self.run.data.microbatches,
            functools.partial(stop_gradients, self.run.optimizer),
            self.run.seed if any(quantizer.rule.random for _, quantizer in self.run.rules) else None,
        )
        return jax.jit(step, out_shardings=(tree_shardings(state, self.mesh), None), donate_argnums=0)

    @functools.cached_property
    def jitted_loss(self) -> Any:
        """The jitted objective in float32: (student's `clip` and `heads`, batch, teacher's parameters) -> metrics.

        The metrics are those of `Objective.loss`, `pairs`, the number of pairs that are not masked, and `faults`, the
        number of rows by index in `FAULTS`. A teacher cache counts as no teacher.
        """
        student = CLIP(self.run.model, self.run.rules, jnp.float32)
        teacher = None if isinstance(self.teacher, TeacherCache) else self._teacher(jnp.float32)
        pixels = self.run.preprocess
        objective = Objective(Encoders(student, pixels.mean, pixels.std), teacher, self.run.loss)

        def loss(params: Any, batch: dict[str, jax.Array], teacher_params: Any) -> dict[str, jax.Array]:
            embeddings, of_layers = objective.encode(params, teacher_params, batch, batch)
            _, metrics = objective.loss(params, teacher_params, batch, embeddings, of_layers)
            pairs, faults = jnp.sum(batch["weight"] > 0), jnp.bincount(batch["fault"], length=len(FAULTS))
            return metrics | {"pairs": pairs, "faults": faults}

        return jax.jit(loss, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    def _teacher(self, dtype: Any) -> Encoders | float | None:
        teacher = self.teacher
        if teacher is None:
            return None
        if isinstance(teacher, TeacherCache):
            return teacher.logit_scale
        return Encoders(CLIP(teacher.config, teacher.rules, dtype), teacher.preprocess.mean, teacher.preprocess.std)

    def _sharded(self, shapes: Any) -> Any:
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            tree_shardings(shapes, self.mesh),
        )
