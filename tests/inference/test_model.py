"""Inference models: packing, batches, inputs, and the fingerprint."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tclip_jax.artifacts import write_artifact
from tclip_jax.artifacts.pack import flatten
from tclip_jax.data import images
from tclip_jax.data.images import Preprocess
from tclip_jax.inference.model import Model, _forward, fingerprint
from tclip_jax.models.clip import CLIP
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TernaryRules
from tclip_jax.ternary import TernaryTensor, default_activations
from tclip_jax.ternary.kernels import kernel

Tree = dict[str, Any]
RNG = np.random.default_rng(0)
PIXELS = RNG.normal(size=(5, 16, 16, 3)).astype(np.float32)
TOKENS = RNG.integers(0, 50, (5, 6))


@pytest.fixture(scope="module")
def packed_model(model_config: CLIPConfig, preprocess: Preprocess, packed: Tree) -> Model:
    return Model(model_config, preprocess, packed)


@pytest.fixture(scope="module")
def fake_quantized(model_config: CLIPConfig, preprocess: Preprocess, latent: Tree, rules: TernaryRules) -> Model:
    return Model(model_config, preprocess, latent, rules)


def test_packed_and_fake_quantized_models_agree_bit_exactly(packed_model: Model, fake_quantized: Model) -> None:
    np.testing.assert_array_equal(packed_model.encode_image(PIXELS), fake_quantized.encode_image(PIXELS))
    np.testing.assert_array_equal(packed_model.encode_text(TOKENS), fake_quantized.encode_text(TOKENS))


@pytest.mark.parametrize(
    "implementation",
    [pytest.param(None, marks=pytest.mark.slow), pytest.param("reference", marks=pytest.mark.slow), "xla_int8"],
)
def test_repacked_models_equal_the_fake_quantized_one(
    packed_model: Model, fake_quantized: Model, implementation: str | None
) -> None:
    repacked = packed_model.repacked(implementation=implementation, activations="A32")
    leaves = flatten(repacked.params)
    assert not [path for path, leaf in leaves.items() if isinstance(leaf, TernaryTensor)]
    for path, leaf in flatten(packed_model.params).items():
        if isinstance(leaf, TernaryTensor) and leaf.axis == -2:
            np.testing.assert_array_equal(kernel(leaves[path].layout).unpack(leaves[path]), leaf.dequantize())
    by_default = packed_model.repacked(implementation=implementation)
    assert by_default.activations == default_activations(implementation)
    rounded = packed_model.repacked(implementation=implementation, activations="A8")
    for method, inputs in (("encode_image", PIXELS), ("encode_text", TOKENS)):
        expected = getattr(fake_quantized, method)(inputs)
        np.testing.assert_allclose(getattr(repacked, method)(inputs), expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(getattr(by_default, method)(inputs), expected, rtol=0, atol=1e-4)
        approximate = getattr(rounded, method)(inputs)
        assert np.abs(approximate - expected).max() > 0
        assert (approximate * expected).sum(axis=1).min() >= 0.999


def test_rules_change_the_embeddings(
    model_config: CLIPConfig, preprocess: Preprocess, latent: Tree, fake_quantized: Model
) -> None:
    unquantized = Model(model_config, preprocess, latent)
    assert np.abs(unquantized.encode_image(PIXELS) - fake_quantized.encode_image(PIXELS)).max() > 0.01


@pytest.mark.parametrize("rest_dtype", ["float32", "float16"])
def test_a_loaded_model_equals_the_written_one(
    packed_model: Model, packed: Tree, rules: TernaryRules, tmp_path: pathlib.Path, rest_dtype: Any
) -> None:
    described = {"config": packed_model.config, "preprocess": packed_model.preprocess, "rules": rules}
    write_artifact(tmp_path / "a", **described, params=packed, rest_dtype=rest_dtype)
    loaded = Model.load(tmp_path / "a", implementation="reference")
    tolerance = 0 if rest_dtype == "float32" else 2e-3
    np.testing.assert_allclose(loaded.encode_image(PIXELS), packed_model.encode_image(PIXELS), rtol=0, atol=tolerance)
    np.testing.assert_allclose(loaded.encode_text(TOKENS), packed_model.encode_text(TOKENS), rtol=0, atol=tolerance)
    assert loaded.logit_scale == packed_model.logit_scale == pytest.approx(np.exp(np.float64(packed["logit_scale"])))


@pytest.mark.parametrize("count", [0, 1, 3, 5])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_embeddings_do_not_depend_on_batches(packed_model: Model, count: int, batch_size: int) -> None:
    image = packed_model.encode_image(PIXELS[:count], batch_size=batch_size)
    assert image.shape == (count, 8)
    assert image.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(image, packed_model.encode_image(PIXELS)[:count], atol=1e-6)
    text = packed_model.encode_text(TOKENS[:count], batch_size=batch_size)
    np.testing.assert_allclose(text, packed_model.encode_text(TOKENS)[:count], atol=1e-6)


def test_one_batch_size_compiles_once(packed_model: Model, packed: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    traced, encode = [], CLIP.encode_image

    def encode_image(self: CLIP, batch: jax.Array) -> jax.Array:
        traced.append(batch.shape)
        return encode(self, batch)

    monkeypatch.setattr(CLIP, "encode_image", encode_image)
    other = Model(packed_model.config, packed_model.preprocess, packed)
    for count in (6, 5, 4):
        packed_model.encode_image(np.resize(PIXELS, (count, 16, 16, 3)), batch_size=3)
        other.encode_image(np.resize(PIXELS, (count, 16, 16, 3)), batch_size=3)
    assert traced == [(3, 16, 16, 3)]


def test_parameters_are_arguments_of_the_program(packed_model: Model) -> None:
    encoder = CLIP(packed_model.config)
    program = jax.make_jaxpr(_forward, static_argnums=(0, 3))(encoder, packed_model.params, PIXELS, "encode_image")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(packed_model.params))
    assert sum(np.size(constant) for constant in program.consts) < parameters / 100


def test_images_are_preprocessed_for_the_model(packed_model: Model, tmp_path: pathlib.Path) -> None:
    pictures = [Image.fromarray(RNG.integers(0, 256, (20 + i, 30, 3), np.uint8)) for i in range(3)]
    pixels = np.stack([images.preprocess(picture, packed_model.preprocess) for picture in pictures])
    expected = packed_model.encode_image(images.normalize(pixels, images.OPENAI_MEAN, images.OPENAI_STD))
    np.testing.assert_array_equal(packed_model.encode_image(pictures), expected)
    np.testing.assert_allclose(packed_model.encode_image(pictures[0])[0], expected[0], atol=1e-6)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    same: list[Any] = [paths, [str(path) for path in paths], [np.asarray(picture) for picture in pictures]]
    for each in same:
        np.testing.assert_array_equal(packed_model.encode_image(each), expected)
        np.testing.assert_allclose(packed_model.encode_image(each[0]), expected[:1], atol=1e-6)
    stacked = np.stack([np.asarray(pictures[0])] * 3)
    np.testing.assert_allclose(packed_model.encode_image(stacked), expected[[0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(packed_model.encode_image(jnp.asarray(stacked)), expected[[0, 0, 0]], atol=1e-6)
    assert packed_model.encode_image([]).shape == (0, 8) and packed_model.preprocess([]).shape == (0, 16, 16, 3)
    np.testing.assert_array_equal(packed_model.encode_image(packed_model.preprocess(paths)), expected)


def test_a_file_that_is_not_an_image_is_named(packed_model: Model, tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a.png: not a usable image \(10 bytes\)"):
        packed_model.encode_image(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"b\.png: no such file$"):
        packed_model.encode_image([tmp_path / "b.png"])
    os.mkfifo(tmp_path / "pipe.png")
    for path, reason in ((tmp_path / "pipe.png", "not a regular file"), (tmp_path, "IsADirectoryError")):
        with pytest.raises(ValueError, match=rf"^{path}: .*{reason}"):
            packed_model.encode_image(path)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["packed", "repacked", "latent"])
def test_apply_is_pure(which: str, packed_model: Model, fake_quantized: Model) -> None:
    model = {"packed": packed_model, "repacked": packed_model.repacked(activations="A32"), "latent": fake_quantized}[
        which
    ]
    for name, inputs in (("image", PIXELS), ("text", TOKENS)):
        apply, encode = getattr(model, f"apply_{name}"), getattr(model, f"encode_{name}")
        expected = encode(inputs)
        embeddings = jax.jit(apply)(model.params, jnp.asarray(inputs))
        assert isinstance(embeddings, jax.Array) and embeddings.dtype == jnp.float32
        np.testing.assert_allclose(embeddings, expected, atol=1e-6)
        single = jax.jit(jax.vmap(lambda params, one, apply=apply: apply(params, one[None])[0], (None, 0)))
        np.testing.assert_allclose(single(model.params, jnp.asarray(inputs)), expected, atol=1e-6)
    total = lambda pixels, params: model.apply_image(params, pixels)[:, 0].sum()  # noqa: E731
    slope = jax.jit(jax.grad(total))(jnp.asarray(PIXELS), model.params)
    assert slope.shape == PIXELS.shape and np.abs(slope).max() > 0


@pytest.mark.parametrize("implementation", ["reference", "xla_int8"])
def test_apply_is_exported_with_a_batch_of_any_size(implementation: str, packed_model: Model) -> None:
    model = packed_model.repacked(implementation=implementation)
    for name, inputs in (("image", PIXELS), ("text", TOKENS.astype(np.int32))):
        shape = jax.export.symbolic_shape("batch, ...", like=inputs.shape)
        apply = jax.jit(getattr(model, f"apply_{name}"))
        exported = jax.export.export(apply)(model.params, jax.ShapeDtypeStruct(shape, inputs.dtype))
        expected = getattr(packed_model, f"encode_{name}")(inputs)
        for count in (1, 4):
            np.testing.assert_allclose(exported.call(model.params, inputs[:count]), expected[:count], atol=1e-6)


def test_latent_weights_have_gradients(fake_quantized: Model) -> None:
    total = lambda params: fake_quantized.apply_image(params, jnp.asarray(PIXELS)).sum()  # noqa: E731
    gradients = flatten(jax.jit(jax.grad(total))(fake_quantized.params))
    assert np.abs(gradients["image/blocks/mlp/fc1/kernel"]).max() > 0


def test_trits_of_any_layer_packed_or_not(packed_model: Model, fake_quantized: Model) -> None:
    for path, leaf in flatten(packed_model.params).items():
        if not isinstance(leaf, TernaryTensor):
            with pytest.raises(ValueError, match=rf"^{path} is not ternary: it is float32 \("):
                packed_model.trits(path)
            continue
        for model in (packed_model, packed_model.repacked(), fake_quantized):
            weight = model.trits(path)
            assert (weight.axis, weight.trits.dtype) == (leaf.axis, jnp.int8)
            np.testing.assert_array_equal(weight.trits, leaf.trits)
            np.testing.assert_array_equal(weight.dequantize(), leaf.dequantize())
    assert packed_model.trits("image/blocks/mlp/fc1/kernel").shape == (2, 24, 96)
    with pytest.raises(ValueError, match="the model has no 'image/fc1': the nearest is"):
        packed_model.trits("image/fc1")


def test_tokenize_gives_the_tokens_that_encode_text_uses(packed_model: Model) -> None:
    np.testing.assert_array_equal(packed_model.tokenize("a dog"), [[49406, 320, 1929, 49407, 0, 0]])
    assert packed_model.tokenize(["a dog", "a cat"]).shape == (2, 6)


def test_texts_are_tokenized(model_config: CLIPConfig, preprocess: Preprocess, latent: Tree) -> None:
    table = RNG.normal(size=(49408, 16)).astype(np.float32)
    text = {**latent["text"], "token_embedding": {"embedding": table}}
    whole = CLIPConfig.from_open_clip(
        {**model_config.to_open_clip(), "text_cfg": {**model_config.to_open_clip()["text_cfg"], "vocab_size": 49408}}
    )
    model = Model(whole, preprocess, {**latent, "text": text})
    expected = model.encode_text(np.array([[49406, 320, 1929, 49407, 0, 0]]))
    np.testing.assert_array_equal(model.encode_text("a dog"), expected)
    np.testing.assert_allclose(model.encode_text(["a cat", "A  dog"])[1:], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (np.zeros((1, 16, 16, 3), np.int32), r"images are int32 \(1, 16, 16, 3\): they must be uint8 \(N, H, W, 3\)"),
        (np.zeros((1, 16, 16, 4), np.uint8), r"an image is uint8 \(16, 16, 4\): it must be uint8 \(H, W, 3\)"),
        (np.zeros((16, 16), np.uint8), r"an image is uint8 \(16,\): it must be uint8 \(H, W, 3\)"),
        (np.zeros((16, 16, 3)), r"images are float64 \(16, 16, 3\): .* \(N, 16, 16, 3\)"),
        (np.zeros((1, 3, 16, 16)), r"images are float64 \(1, 3, 16, 16\)"),
        ([3], r"an image is 3: it must be a path, a PIL image, or uint8 \(H, W, 3\)"),
        ([None], r"an image is None: it must be a path"),
    ],
)
def test_arrays_that_are_not_images_are_refused(packed_model: Model, argument: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        packed_model.encode_image(argument)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (np.zeros((1, 6)), r"tokens are float64 \(1, 6\): they must be integers \(N, 6\)"),
        (np.zeros((1, 5), int), r"tokens are int64 \(1, 5\)"),
        (np.full((1, 6), 50), "tokens are 50 to 50: the vocabulary is 0 to 49"),
        (np.full((1, 6), -1), "tokens are -1 to -1"),
        ("a dog", "tokens are 0 to 49407: the vocabulary is 0 to 49"),
        ([3], "a text is 3: it must be a string"),
        (["a dog", None], "a text is None: it must be a string"),
    ],
)
def test_invalid_tokens_are_refused(packed_model: Model, argument: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        packed_model.encode_text(argument)


def test_pure_functions_refuse_what_does_not_fit_under_jit_too(packed_model: Model) -> None:
    with pytest.raises(ValueError, match=r"images are float32 \(1, 8, 8, 3\): .* \(N, 16, 16, 3\)"):
        jax.jit(packed_model.apply_image)(packed_model.params, jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"tokens are int32 \(1, 5\): they must be integers \(N, 6\)"):
        jax.jit(packed_model.apply_text)(packed_model.params, jnp.zeros((1, 5), jnp.int32))


def test_batch_size_is_positive(packed_model: Model) -> None:
    with pytest.raises(ValueError, match=r"^batch_size is 0: it must be 1 or more"):
        packed_model.encode_text(TOKENS, batch_size=0)


def test_the_fingerprint_of_a_run_changes_with_everything_that_changes_embeddings(
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


def test_the_fingerprint_of_an_artifact_does_not_depend_on_the_packing(
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
