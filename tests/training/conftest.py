"""Programs of the tests here run for milliseconds."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def compile_fast(fast_compilation: None) -> None:
    """Of every test."""
