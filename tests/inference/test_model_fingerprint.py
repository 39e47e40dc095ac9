from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax

from tclip_jax.artifacts import write_artifact
from tclip_jax.data.images import Preprocess
from tclip_jax.inference.model import Model, fingerprint
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TernaryRules

Tree = dict[str, Any]


def test_of_a_run_it_changes_with_all_that_changes_embeddings(
    model_config: CLIPConfig, preprocess: Preprocess, latent: Tree, rules: TernaryRules, tmp_path: pathlib.Path
) -> None:
    model = Model(model_config, preprocess, latent, rules)
    leaves, structure = jax.tree.flatten(latent)
    leaves[3] = leaves[3] + 1e-3
    models = [
        model,
        dataclasses.replace(model, rules=rules[:2]),
        dataclasses.replace(model, preprocess=Preprocess(16, resize_mode="squash")),
        dataclasses.replace(model, config=dataclasses.replace(model_config, quick_gelu=True)),
        dataclasses.replace(model, params=jax.tree.unflatten(structure, leaves)),
    ]
    assert len({fingerprint(each, tmp_path) for each in models}) == 5
    assert fingerprint(Model(model_config, preprocess, latent, rules), tmp_path / "elsewhere") == fingerprint(
        model, tmp_path
    )


def test_of_an_artifact_it_is_of_the_weights_and_not_of_how_they_are_packed(
    model_config: CLIPConfig, preprocess: Preprocess, packed: Tree, rules: TernaryRules, tmp_path: pathlib.Path
) -> None:
    def write(name: str, **changed: Any) -> str:
        fields = {"config": model_config, "preprocess": preprocess, "params": packed, "rules": rules} | changed
        write_artifact(tmp_path / name, **fields)
        return fingerprint(Model(model_config, preprocess, {}), tmp_path / name)

    mark = write("a")
    assert write("b", figures={"top1": 0.5}, rules=()) == mark
    assert write("c", preprocess=Preprocess(16, resize_mode="squash")) != mark
    assert write("d", rest_dtype="float32") != mark
