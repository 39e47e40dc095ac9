"""What any process asks for, known by all of them at the same step."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Agreement:
    """The largest that any process asked for, of every number, as of the question before.

    The answer travels with the devices' own work: asking costs a reduction of a few integers behind the step that was
    dispatched before it, and by the time of the next question the answer is there. A process that is alone needs no
    device, but waits for its answer as long, so that a run does the same on any number of processes.
    """

    def __init__(self, mesh: Mesh, count: int) -> None:
        self._count = count
        self._answer: jax.Array | tuple[int, ...] = (0,) * count
        flat = Mesh(mesh.devices.reshape(-1), ("everyone",))
        self._sharding = NamedSharding(flat, PartitionSpec("everyone"))
        self._largest = jax.jit(lambda x: jnp.max(x, axis=0), out_shardings=NamedSharding(flat, PartitionSpec()))

    def ask(self, values: Sequence[int]) -> tuple[int, ...]:
        """Asks for `values`, of int32, and returns what was agreed on when it was called last; at first zeros.

        A collective: every process must call it, as often as the others and in the same order.
        """
        answer = tuple(int(each) for each in np.asarray(self._answer))
        if jax.process_count() == 1:
            self._answer = tuple(values)
        else:
            rows = np.tile(np.array(values, np.int32), (jax.local_device_count(), 1))
            shape = (jax.device_count(), self._count)
            self._answer = self._largest(jax.make_array_from_process_local_data(self._sharding, rows, shape))
        return answer
