"""Programs of the tests here run for milliseconds, and are kept no longer than for the tests of one file."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Gives back the memory of compiled programs, gigabytes in all, which slows down whatever comes after."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def compile_fast(fast_compilation: None) -> None:
    """Of every test."""
