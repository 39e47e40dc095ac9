"""One small model with every granularity of scales, packed and written once."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from etils import epath

from tclip_jax.artifacts import pack_params, write_artifact
from tclip_jax.artifacts.files import file_entry
from tclip_jax.artifacts.manifest import MANIFEST, dump_manifest
from tclip_jax.data.images import Preprocess
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import ATTENTION, PATCH_EMBEDDING, TOKEN_EMBEDDING, TernaryRules
from tclip_jax.ternary import Quantizer

Tree = dict[str, Any]


@pytest.fixture(scope="session")
def config(model_config: CLIPConfig) -> CLIPConfig:
    return model_config


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


@pytest.fixture(scope="session")
def mixed_rules(rules: TernaryRules) -> TernaryRules:
    """Attention with 8 bits, the token embedding with 4, in groups of an odd size; the MLPs are ternary."""
    return (
        (ATTENTION, Quantizer(group="channel", kind="uniform", bits=8)),
        (TOKEN_EMBEDDING, Quantizer(group=5, kind="uniform", bits=4)),
        (PATCH_EMBEDDING, Quantizer(group="tensor", kind="uniform", bits=4, scale_bits=24)),
        *rules,
    )


@pytest.fixture(scope="session")
def mixed(latent: Tree, mixed_rules: TernaryRules) -> Tree:
    return pack_params(latent, mixed_rules)


@pytest.fixture(scope="session")
def mixed_written(
    tmp_path_factory: pytest.TempPathFactory,
    config: CLIPConfig,
    preprocess: Preprocess,
    mixed: Tree,
    mixed_rules: TernaryRules,
) -> pathlib.Path:
    """An artifact with trits and integers of 4 and 8 bits, which no test may change."""
    folder = tmp_path_factory.mktemp("artifacts") / "mixed"
    write_artifact(folder, config=config, preprocess=preprocess, params=mixed, rules=mixed_rules)
    return folder


@pytest.fixture
def artifact(written: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the artifact that a test may damage."""
    return pathlib.Path(shutil.copytree(written, tmp_path / "artifact"))


@pytest.fixture
def forge(artifact: pathlib.Path) -> Callable[..., pathlib.Path]:
    """Edits the copy as a malicious author would: the checksums of the manifest and of `changed` are correct."""

    def edit_manifest(
        edit: Callable[[Tree], Any] = lambda manifest: None, changed: tuple[str, ...] = ()
    ) -> pathlib.Path:
        manifest = json.loads((artifact / MANIFEST).read_text())
        manifest["files"] |= {name: file_entry(epath.Path(artifact / name)) for name in changed}
        edit(manifest)
        (artifact / MANIFEST).write_bytes(dump_manifest(manifest))
        return artifact

    return edit_manifest
