"""Arrays that are read from their file when asked for, and not kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
    """An array of known shape and dtype; each `np.asarray` of it calls `load` again."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    load: Callable[[], npt.NDArray[Any]]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self.load(), dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class LazyStack:
    """Arrays of one shape and dtype along a new leading axis; `stack[i]` is one of them, still unread."""

    layers: tuple[LazyArray, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.layers), *self.layers[0].shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.layers[0].dtype

    def __getitem__(self, index: int) -> LazyArray:
        return self.layers[index]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        # Filled in place: np.stack would hold every layer twice.
        stacked = np.empty(self.shape, self.dtype if dtype is None else dtype)
        for i, layer in enumerate(self.layers):
            stacked[i] = layer.load()
        return stacked
