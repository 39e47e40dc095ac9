"""What is known of a step before it runs: from compiling it for devices that are not there, or by formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tclip_jax.planning.collectives import Collective
from tclip_jax.planning.memory import Memory


@dataclasses.dataclass(frozen=True)
class StepFacts:
    """Of one step on one device.

    Attributes:
      how: "compiled" or "by formula".
      mesh: sizes of its axes.
      memory: bytes by what they hold.
      peak: bytes that the compiler says are alive at most at once, those on the chip among them, and gaps between them
        not; 0 by formula. `memory.total` is what is set aside.
      traffic: bytes to and from HBM.
      collectives: the largest first.
      moving_activations: names of collectives that carry a batch x sequence x width array.
      links: for the axes of a collective joined by "+": links of a device that its rings use at once.
      seconds: that compiling took.
    """

    how: str
    mesh: dict[str, int]
    memory: Memory
    peak: int
    traffic: int
    collectives: tuple[Collective, ...]
    moving_activations: tuple[str, ...]
    links: dict[str, int]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"collectives": [each.to_json() for each in self.collectives]}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> StepFacts:
        return cls(
            **{
                **fields,
                "memory": Memory(**fields["memory"]),
                "collectives": tuple(map(Collective.from_json, fields["collectives"])),
                "moving_activations": tuple(fields["moving_activations"]),
            }
        )
