from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from tclip_jax.data.images import HALF_MEAN, HALF_STD, Preprocess, normalize, preprocess
from tclip_jax.data.tokenizer import Tokenizer
from tclip_jax.interop.export import export_model
from tclip_jax.interop.hugging_face import from_hugging_face
from tclip_jax.interop.open_clip import from_open_clip
from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import PRESETS
from tclip_jax.ternary import TernaryTensor

Params = dict[str, Any]
Draw = Callable[[CLIPConfig], Params]

TINY = CLIPConfig.from_open_clip(PRESETS["tiny"])
# Sizes whose centred crop needs no rounding; transformers and open_clip round differently.
SIZES = ((64, 48), (32, 32), (40, 100), (300, 60))
CAPTIONS = ["a photo of a cat", "", "two dogs, 1 ball & a very long caption " * 8, "Ünïcode naïve café"]


def narrow(preset: str, width: int, layers: int, quick_gelu: bool) -> CLIPConfig:
    """Return a preset with its image size, patches and context, but narrower and fewer layers."""
    config = CLIPConfig.from_open_clip(PRESETS[preset])
    vision = dataclasses.replace(config.vision, width=width, layers=layers)
    text = dataclasses.replace(config.text, width=width, heads=4, layers=layers)
    return dataclasses.replace(config, vision=vision, text=text, quick_gelu=quick_gelu)


def with_ternary_leaves(params: Params) -> Params:
    """Replace the first text MLP weight by trits and scales of eight significant bits, two groups a column."""
    rng = np.random.default_rng(2)
    leaves, path = flatten_dict(params, sep="/"), "text/blocks/mlp/fc1/kernel"
    layers, inputs, outputs = leaves[path].shape
    trits = rng.integers(-1, 2, (layers, inputs, outputs), np.int8)
    scale = (rng.integers(128, 256, (layers, 2, outputs)) / 2048).astype(np.float32)
    leaves[path] = TernaryTensor(jnp.asarray(trits), jnp.asarray(scale), inputs // 2)
    return unflatten_dict(leaves, sep="/")


def images() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in SIZES]


def assert_both_libraries_agree(folder: pathlib.Path, config: CLIPConfig, pixels: Preprocess, params: Params) -> None:
    """Load the folder strictly in both libraries; their processors give our inputs, and their models our embeddings."""
    import open_clip
    import torch
    import transformers

    batch = np.stack([normalize(preprocess(image, pixels), pixels.mean, pixels.std) for image in images()])
    tokens = Tokenizer(config.text.context_length)(CAPTIONS)
    with jax.default_matmul_precision("highest"):
        image, text, _ = CLIP(config).apply({"params": params}, batch, tokens)

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    theirs = torch.stack([transform(image) for image in images()])
    np.testing.assert_allclose(theirs.permute(0, 2, 3, 1), batch, rtol=0, atol=1e-6)
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    np.testing.assert_array_equal(ids, tokens)
    with torch.no_grad():
        np.testing.assert_allclose(model.eval().encode_image(theirs, normalize=True), image, rtol=0, atol=1e-5)
        np.testing.assert_allclose(model.encode_text(ids, normalize=True), text, rtol=0, atol=1e-5)

    model, loading = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    # The default backend resizes with torchvision, up to two grey levels from Pillow.
    processor = transformers.CLIPProcessor.from_pretrained(folder, backend="pil")
    inputs = processor(text=CAPTIONS, images=images(), padding=True, truncation=True, return_tensors="pt")
    np.testing.assert_allclose(inputs["pixel_values"].permute(0, 2, 3, 1), batch, rtol=0, atol=1e-6)
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    np.testing.assert_allclose(outputs.image_embeds, image, rtol=0, atol=1e-5)
    np.testing.assert_allclose(outputs.text_embeds, text, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, random_params: Draw) -> tuple[pathlib.Path, Preprocess, Params]:
    folder = tmp_path_factory.mktemp("export") / "tiny"
    params = with_ternary_leaves(random_params(TINY))
    pixels = Preprocess(32, mean=HALF_MEAN, std=HALF_STD)
    export_model(folder, config=TINY, preprocess=pixels, params=params, figures={"zero-shot top-1": 0.5})
    return folder, pixels, params


@pytest.mark.torch
def test_tiny_model_in_both_libraries(exported: tuple[pathlib.Path, Preprocess, Params]) -> None:
    assert_both_libraries_agree(exported[0], TINY, *exported[1:])


@pytest.mark.torch
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_narrow_vit_b_32_in_both_libraries(quick_gelu: bool, tmp_path: pathlib.Path, random_params: Draw) -> None:
    config = narrow("ViT-B-32", width=128, layers=2, quick_gelu=quick_gelu)
    params, pixels = random_params(config), Preprocess(224)
    export_model(tmp_path / "out", config=config, preprocess=pixels, params=params)
    assert_both_libraries_agree(tmp_path / "out", config, pixels, params)


@pytest.mark.torch
@pytest.mark.slow
def test_vit_b_16_in_both_libraries(tmp_path: pathlib.Path) -> None:
    config = CLIPConfig.from_open_clip(PRESETS["ViT-B-16-quickgelu"])
    rng, initial = np.random.default_rng(0), init_params(CLIP(config), jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.02 * rng.standard_normal(leaf.shape, np.float32), initial)
    pixels = Preprocess(224)
    export_model(tmp_path / "out", config=config, preprocess=pixels, params=params)
    assert_both_libraries_agree(tmp_path / "out", config, pixels, params)


def test_export_of_an_import_is_identical_to_the_byte(
    exported: tuple[pathlib.Path, Preprocess, Params], tmp_path: pathlib.Path
) -> None:
    folder, pixels, _ = exported
    states = [
        safetensors.numpy.load_file(folder / "open_clip_model.safetensors"),
        from_hugging_face(safetensors.numpy.load_file(folder / "model.safetensors"), TINY),
    ]
    for i, state in enumerate(states):
        again = tmp_path / str(i)
        export_model(again, config=TINY, preprocess=pixels, params=from_open_clip(state, TINY))
        for file in folder.iterdir():
            if file.name != "README.md":
                assert (again / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_eight_bit_scales_are_exact_in_half_precision(
    dtype: str, exported: tuple[pathlib.Path, Preprocess, Params], tmp_path: pathlib.Path
) -> None:
    folder, pixels, params = exported
    export_model(tmp_path / "half", config=TINY, preprocess=pixels, params=params, dtype=dtype)
    whole = safetensors.numpy.load_file(folder / "open_clip_model.safetensors")
    half = safetensors.numpy.load_file(tmp_path / "half" / "open_clip_model.safetensors")
    assert {value.dtype.name for value in half.values()} == {dtype}
    key = "transformer.resblocks.1.mlp.c_fc.weight"
    np.testing.assert_array_equal(half[key].astype(np.float32), whole[key])
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == dtype


def test_files_say_that_they_hold_torch_tensors(exported: tuple[pathlib.Path, Preprocess, Params]) -> None:
    for name in ("model.safetensors", "open_clip_model.safetensors"):
        with safetensors.safe_open(exported[0] / name, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}


def test_model_card_gives_ternary_share_and_figures(exported: tuple[pathlib.Path, Preprocess, Params]) -> None:
    card = (exported[0] / "README.md").read_text()
    total = sum(leaf.size for leaf in safetensors.numpy.load_file(exported[0] / "model.safetensors").values())
    assert f"{total:,} parameters" in card
    assert f"{2 * 64 * 256 / total:.1%} of them are ternary" in card
    assert "| zero-shot top-1 | 0.5 |" in card


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is not one of float32, bfloat16, float16"),
        ({"preprocess": Preprocess(64)}, r"preprocessing gives images of \(64, 64\): the model takes \(32, 32\)"),
        ({"preprocess": Preprocess(32, resize_mode="longest")}, "CLIPImageProcessor has no resize_mode 'longest'"),
        ({"params": {"logit_scale": np.float32(1)}}, "the parameter tree does not fit the model: missing image/"),
        ({"config": dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, pool_type="last"))}, "pool_type"),
    ],
)
def test_what_cannot_be_exported_leaves_nothing_behind(
    changed: dict[str, Any], message: str, exported: tuple[pathlib.Path, Preprocess, Params], tmp_path: pathlib.Path
) -> None:
    _, pixels, params = exported
    with pytest.raises(ValueError, match=message):
        export_model(tmp_path / "out", **({"config": TINY, "preprocess": pixels, "params": params} | changed))
    assert not list(tmp_path.iterdir())


def test_only_an_earlier_export_is_replaced_and_only_when_asked(
    exported: tuple[pathlib.Path, Preprocess, Params], tmp_path: pathlib.Path
) -> None:
    _, pixels, params = exported
    (tmp_path / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=tmp_path.name):
            export_model(tmp_path, config=TINY, preprocess=pixels, params=params, overwrite=overwrite)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    earlier = tmp_path / "export"
    for overwrite in (False, True):
        export_model(earlier, config=TINY, preprocess=pixels, params=params, overwrite=overwrite)
        assert (earlier / "model.safetensors").exists()
    with pytest.raises(FileExistsError, match=r"export exists"):
        export_model(earlier, config=TINY, preprocess=pixels, params=params)
