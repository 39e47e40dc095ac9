"""Compare the configurations that two models state, option by option, with the names of open_clip."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict

from tclip_jax.data.images import Preprocess
from tclip_jax.interop.hugging_face_config import config_from_hugging_face
from tclip_jax.interop.metadata import HUGGING_FACE, Metadata, from_open_clip, preprocess_of, warn_of_assumption
from tclip_jax.interop.reader import read_json
from tclip_jax.keys import Recipe, recipe
from tclip_jax.numerics.torch_side import library_of

Options = dict[str, Any]
Differences = dict[str, tuple[Any, Any]]  # option -> ours, the reference's

# Models that differ in one of these have taps of other shapes.
_SHAPES = (
    *("embed_dim", "vision.image_size", "vision.patch_size", "vision.width", "vision.layers"),
    *("text.context_length", "text.width", "text.layers"),
)


def folder_recipe(folder: epath.PathLike) -> Recipe:
    """Return what a folder of open_clip or transformers states, as `model_recipe`.

    Without a preprocessor file it has no `preprocess`.

    Raises:
      ValueError: the model is not supported.
    """
    folder = epath.Path(folder)
    if library_of(folder) == "open_clip":
        metadata = from_open_clip(folder)
        return recipe(config=metadata.config, preprocess=metadata.preprocess)
    document = read_json(folder / HUGGING_FACE)
    config, preprocess = config_from_hugging_face(document), preprocess_of(folder)
    if preprocess is None:
        warn_of_assumption(folder, Preprocess(config.vision.image_size))
        return recipe(config=config)
    return recipe(config=config, preprocess=preprocess)


def recipe_of_towers(files: Mapping[str, epath.Path], stated: Mapping[str, Metadata]) -> Recipe:
    """Return what the files of both towers state, as `model_recipe`.

    Raises:
      ValueError: they are of different models.
    """
    if stated["image"] != stated["text"]:
        raise ValueError(f"{files['image']} and {files['text']} state different models: export them together")
    return recipe(config=stated["image"].config, preprocess=stated["image"].preprocess)


def states_preprocess(path: epath.PathLike) -> bool:
    """Whether the files at `path` state a preprocessing; only a folder of transformers may lack it."""
    return library_of(path) != "transformers" or preprocess_of(epath.Path(path)) is not None


def options(made_by: Mapping[str, Any]) -> Options:
    """Return the options of a recipe by name, such as "quick_gelu" and "vision.layers"; none for an empty recipe."""
    if not made_by:
        return {}
    made_by = recipe(**made_by)
    values = flatten_dict(made_by["config"], sep=".")
    for tower in ("vision", "text"):
        # Equal models may state ratios that round to the same width.
        values[f"{tower}.mlp_width"] = int(values[f"{tower}.width"] * values.pop(f"{tower}.mlp_ratio"))
    return values | {f"preprocess.{name}": value for name, value in made_by.get("preprocess", {}).items()}


def differences(ours: Mapping[str, Any], reference: Mapping[str, Any]) -> Differences:
    """Return the options that both recipes state and that differ, as (ours, the reference's)."""
    left, right = options(ours), options(reference)
    return {name: (left[name], right[name]) for name in left if name in right and left[name] != right[name]}


def in_words(differing: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Return a line for each difference: "quick_gelu: ours true, reference false"."""
    return [f"{name}: ours {json.dumps(a)}, reference {json.dumps(b)}" for name, (a, b) in differing.items()]


def other_shapes(differing: Mapping[str, Any]) -> bool:
    """Whether models that differ in these options have taps of other shapes."""
    return not differing.keys().isdisjoint(_SHAPES)
