"""Compiled programs are dropped after each test file: they hold gigabytes in all."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Frees the memory of compiled programs, which would slow down later tests."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def compile_fast(fast_compilation: None) -> None:
    """Of every test."""
