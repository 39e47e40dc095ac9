"""One small model with every granularity of scales, packed and written once."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from etils import epath

from tclip_jax.artifacts import write_artifact
from tclip_jax.artifacts.files import file_entry
from tclip_jax.artifacts.manifest import MANIFEST, dump_manifest
from tclip_jax.data.images import Preprocess
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TernaryRules

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
