"""The public names of the package."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tclip_jax


def test_public_names_are_those_of_their_modules() -> None:
    from tclip_jax import inference, ternary
    from tclip_jax.losses.contrastive import info_nce
    from tclip_jax.models.clip import CLIP

    assert {name for name in tclip_jax.__all__ if getattr(tclip_jax, name) is None} == set()
    assert tclip_jax.Model is inference.model.Model and tclip_jax.ternarize is ternary.ternarize
    assert tclip_jax.losses.info_nce is info_nce and tclip_jax.models.CLIP is CLIP
    assert dir(tclip_jax) == sorted(tclip_jax.__all__)
    with pytest.raises(AttributeError, match="module 'tclip_jax' has no attribute 'ternarise'"):
        _ = tclip_jax.ternarise


def test_they_are_imported_when_asked_for() -> None:
    program = (
        "import sys, tclip_jax; assert 'jax' not in sys.modules; tclip_jax.losses.crd; tclip_jax.Quantizer(); "
        "assert 'tclip_jax.inference' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
