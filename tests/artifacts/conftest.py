"""One small model with every granularity of scales, packed and written once."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from tclip_jax.artifacts import pack_params, write_artifact
from tclip_jax.artifacts.files import file_entry
from tclip_jax.artifacts.manifest import MANIFEST, dump_manifest
from tclip_jax.data.images import Preprocess
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import ATTENTION, MLP, TOKEN_EMBEDDING, TernaryRules
from tclip_jax.ternary import Quantizer

Tree = dict[str, Any]


@pytest.fixture(scope="session")
def config() -> CLIPConfig:
    vision = VisionConfig(image_size=(16, 16), patch_size=8, width=24, layers=2, head_width=12)
    return CLIPConfig(8, vision, TextConfig(context_length=6, vocab_size=50, width=16, heads=2, layers=1))


@pytest.fixture(scope="session")
def preprocess() -> Preprocess:
    return Preprocess(16)


@pytest.fixture(scope="session")
def rules() -> TernaryRules:
    return (
        (MLP, Quantizer(group=20)),  # neither width is a multiple: the last groups are short
        (ATTENTION, Quantizer(group="channel", scale_bits=11)),
        (TOKEN_EMBEDDING, Quantizer(group="tensor", scale_bits=24)),
    )


@pytest.fixture(scope="session")
def latent(config: CLIPConfig) -> Tree:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), param_shapes(config))


@pytest.fixture(scope="session")
def packed(latent: Tree, rules: TernaryRules) -> Tree:
    return pack_params(latent, rules)


@pytest.fixture(scope="session")
def written(
    tmp_path_factory: pytest.TempPathFactory,
    config: CLIPConfig,
    preprocess: Preprocess,
    packed: Tree,
    rules: TernaryRules,
) -> pathlib.Path:
    """An artifact that no test may change."""
    folder = tmp_path_factory.mktemp("artifacts") / "written"
    write_artifact(folder, config=config, preprocess=preprocess, params=packed, rules=rules, figures={"top1": 0.5})
    return folder


@pytest.fixture
def artifact(written: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the artifact, to break."""
    return pathlib.Path(shutil.copytree(written, tmp_path / "artifact"))


@pytest.fixture
def forge(artifact: pathlib.Path) -> Callable[..., pathlib.Path]:
    """Edits the copy as a malicious author would: the checksums of the manifest and of the files in `changed` fit."""

    def edit_manifest(
        edit: Callable[[Tree], Any] = lambda manifest: None, changed: tuple[str, ...] = ()
    ) -> pathlib.Path:
        manifest = json.loads((artifact / MANIFEST).read_text())
        manifest["files"] |= {name: file_entry((artifact / name).read_bytes()) for name in changed}
        edit(manifest)
        (artifact / MANIFEST).write_bytes(dump_manifest(manifest))
        return artifact

    return edit_manifest
