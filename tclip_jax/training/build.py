"""Student, optimizer, state and jitted step of a run on a mesh, with arrays or with shapes alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tclip_jax.data.embedding_store import TeacherCache
from tclip_jax.data.sources import FAULTS
from tclip_jax.inference.load import Architecture
from tclip_jax.inference.model import Model
from tclip_jax.models.clip import CLIP, param_shapes
from tclip_jax.models.ternary_rules import TernaryRules, find_quantizer
from tclip_jax.parallel.mesh import BATCH_AXES, batch_sharding
from tclip_jax.parallel.sharding import path_of, tree_shardings
from tclip_jax.runs.config import RunConfig
from tclip_jax.ternary.int8 import Int8Matrix, round_matrix
from tclip_jax.training.objective import Encoders, Objective, check_teacher
from tclip_jax.training.optimizer import clip_latent, make_optimizer, soft_phase, stop_gradients
from tclip_jax.training.state import TrainState, init_state
from tclip_jax.training.step import make_train_step


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


def teacher_params(params: Any, rules: TernaryRules, run: RunConfig) -> Any:
    """Return a teacher's parameters as the step of a run takes them.

    Matrices, which a step rounds to `run.dtype`, are stored in it; the embeddings are the same to the bit. With
    `run.teacher_int8` those of the blocks are int8. Latent weights, vectors and position embeddings stay float32.

    Raises:
      ValueError: `run.teacher_int8` is set, and all matrices of the teacher's blocks are ternary or packed.
    """

    def narrow(key_path: tuple[Any, ...], leaf: Any) -> Any:
        path = path_of(key_path)
        if not path.endswith(("/kernel", "/embedding")) or find_quantizer(path, rules):
            return leaf
        return round_matrix(leaf) if run.teacher_int8 and "/blocks/" in path else leaf.astype(run.dtype)

    stored = jax.tree_util.tree_map_with_path(narrow, params)
    leaves = jax.tree.leaves(stored, is_leaf=lambda leaf: isinstance(leaf, Int8Matrix))
    if run.teacher_int8 and not any(isinstance(leaf, Int8Matrix) for leaf in leaves):
        raise ValueError("config.teacher_int8: the matrices of the teacher's blocks are ternary already: leave it out")
    return stored


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
        run = self.run
        dtype, gradients = jnp.dtype(run.dtype), jnp.dtype(run.gradient_dtype)
        return CLIP(run.model, run.rules, dtype, run.remat, run.attention, gradients)

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
        """The teacher's parameters, of `teacher_params`, as shapes with shardings; None if none runs in the step."""
        if self.teacher is None or isinstance(self.teacher, TeacherCache):
            return None
        rules = self.teacher.rules
        shapes = param_shapes(self.teacher.config, rules)
        return self._sharded(jax.eval_shape(lambda params: teacher_params(params, rules, self.run), shapes))

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
            self._teacher(self.run.attention),
            self.optimizer,
            self.run.loss,
            soft_phase(self.run.ternary_warmup_steps, self.run.ternary_temperature, self.run.ternary_anneal_steps),
            self.run.optimizer.ema_decay,
            self.run.data.microbatches,
            functools.partial(stop_gradients, self.run.optimizer),
            self.run.seed if any(quantizer.rule.random for _, quantizer in self.run.rules) else None,
            functools.partial(clip_latent, rules=self.run.rules, config=self.run.optimizer),
        )
        return jax.jit(step, out_shardings=(tree_shardings(state, self.mesh), None), donate_argnums=0)

    @functools.cached_property
    def jitted_loss(self) -> Any:
        """The jitted objective: (student's `clip` and `heads`, batch, teacher's parameters) -> metrics.

        The metrics are those of `Objective.loss`, `pairs`, the number of pairs that are not masked, and `faults`, the
        number of rows by index in `FAULTS`. The student is computed in float32, the teacher as in the step. A teacher
        cache counts as no teacher.
        """
        # A forced implementation may not take float32, or the rows of an evaluation.
        attention = "reference" if self.run.attention == "reference" else "auto"
        student = CLIP(self.run.model, self.run.rules, jnp.float32, attention=attention)
        teacher = None if isinstance(self.teacher, TeacherCache) else self._teacher(attention)
        pixels = self.run.preprocess
        objective = Objective(Encoders(student, pixels.mean, pixels.std), teacher, self.run.loss)

        def loss(params: Any, batch: dict[str, jax.Array], teacher_params: Any) -> dict[str, jax.Array]:
            embeddings, of_layers = objective.encode(params, teacher_params, batch, batch)
            _, metrics = objective.loss(params, teacher_params, batch, embeddings, of_layers)
            pairs, faults = jnp.sum(batch["weight"] > 0), jnp.bincount(batch["fault"], length=len(FAULTS))
            return metrics | {"pairs": pairs, "faults": faults}

        return jax.jit(loss, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    def _teacher(self, attention: str) -> Encoders | float | None:
        teacher = self.teacher
        if teacher is None:
            return None
        if isinstance(teacher, TeacherCache):
            return teacher.logit_scale
        return Encoders(
            CLIP(teacher.config, teacher.rules, self.student.dtype, attention=attention),
            teacher.preprocess.mean,
            teacher.preprocess.std,
        )

    def _sharded(self, shapes: Any) -> Any:
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            tree_shardings(shapes, self.mesh),
        )
