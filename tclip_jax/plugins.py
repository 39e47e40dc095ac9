"""Decorators that register quantizers, losses, data sources and augmentations of your own.

docs/extending.md shows each of them. Use them in a recipe file, in a file or module that `--plugin` or TCLIP_PLUGINS
names, or in an installed package with an entry point of the group "tclip_jax.plugins".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from tclip_jax.data.augment import AUGMENTATIONS, Augmentation
from tclip_jax.data.sources import SOURCES, SourceKind
from tclip_jax.losses.registry import LOSSES, Loss, Need
from tclip_jax.ternary.quantizers import QUANTIZERS, Kind, LevelsRule, Quantizer

F = TypeVar("F", bound=Callable[..., Any])


def quantizer(
    name: str,
    *,
    gradient: Callable[..., Any] | None = None,
    initial_alpha: Callable[[jax.Array, Quantizer, int], jax.Array] | None = None,
    random: bool = False,
    options: Mapping[str, float] | None = None,
    uniform: bool = False,
) -> Callable[[LevelsRule], LevelsRule]:
    """Register the decorated function as the quantizer `config.quantizer.kind = name`.

    The function is `levels` of `tclip_jax.ternary.Kind`, which describes all arguments. It computes the scales and
    thresholds of a weight: (w, quantizer, axis) -> (scale, threshold or None).

    Raises:
      ValueError: the name is taken, or `initial_alpha` is given without a gradient.
    """

    def register(levels: LevelsRule) -> LevelsRule:
        QUANTIZERS.add(name, Kind(levels, gradient, initial_alpha, random, dict(options or {}), uniform), levels)
        return levels

    return register


def loss(
    name: str,
    doc: str,
    *,
    needs: tuple[Need, ...] = (),
    init_head: Callable[[jax.Array, int, int | None], Any] | None = None,
) -> Callable[[F], F]:
    """Register the decorated function as the loss with the weight `config.loss.<name>`, 0 by default.

    Args:
      name: the name. `run_config` refuses that of an option of `config.loss`.
      doc: one phrase for the configuration reference.
      needs: as in `tclip_jax.losses.registry.Loss`, which also describes the function.
      init_head: as in `Loss`.

    Raises:
      ValueError: the name is taken.
    """

    def register(function: F) -> F:
        LOSSES.add(name, Loss(function, doc, needs, init_head=init_head), function)
        return function

    return register


def source(name: str, usage: str = "") -> Callable[[F], F]:
    """Register the decorated class or function as the data source `<name>:<argument>`.

    It is called with the argument after the colon and the split, and returns a `tclip_jax.data.sources.Source`.

    Args:
      name: the name.
      usage: how it is written, such as "npz:<file>", for errors.

    Raises:
      ValueError: the name is taken.
    """

    def register(opens: F) -> F:
        SOURCES.add(name, SourceKind(usage or f"{name}:<argument>", opens), opens)
        return opens

    return register


def augmentation(name: str) -> Callable[[Augmentation], Augmentation]:
    """Register the decorated function as the augmentation `config.data.augment = name`.

    It is called with a PIL image, a NumPy generator that makes all random draws, and the `Preprocess`, and returns
    uint8 pixels (H, W, 3) of the size `Preprocess.size`.

    Raises:
      ValueError: the name is taken.
    """

    def register(function: Augmentation) -> Augmentation:
        AUGMENTATIONS.add(name, function, function)
        return function

    return register
