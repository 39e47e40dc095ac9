"""The native block against the modules that define it: values, transforms, and when it is used."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tclip_jax.artifacts.pack import pack_params, repack_params
from tclip_jax.inference.runtime import inspect_runtime
from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import model_cfg
from tclip_jax.models.taps import apply_with_states
from tclip_jax.models.ternary_rules import ATTENTION, MLP, ternary_rules
from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.ternary import Quantizer
from tclip_jax.ternary.kernels import native_cpu
from tclip_jax.ternary.tensor import Activations

pytestmark = pytest.mark.skipif(not native_cpu.instruction_sets(), reason="the native library was not built")

Tree = dict[str, Any]


def build(rules: Any = "Q-ALL", activations: Activations = "A32", **options: Any) -> tuple[CLIP, Tree, Tree]:
    """A tiny model; its parameters packed natively, and packed for the reference."""
    config = CLIPConfig.from_open_clip(model_cfg("tiny") | options)
    clip = CLIP(config)
    params = jax.device_get(jax.jit(init_params, static_argnums=0)(clip, jax.random.key(0)))
    packed = pack_params(params, ternary_rules(rules, Quantizer(group=32)))
    native, plain = (
        repack_params(packed, implementation=name, activations=activations) for name in ("native_cpu", "reference")
    )
    return clip, native, plain


def pixels(batch: int = 3) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (batch, *image_size(), 3))


def image_size() -> tuple[int, int]:
    return CLIPConfig.from_open_clip(model_cfg("tiny")).vision.image_size


def tokens(clip: CLIP, batch: int = 3) -> jax.Array:
    return jax.random.randint(jax.random.key(2), (batch, clip.config.text.context_length), 1, 500)


def program(clip: CLIP, params: Tree, method: str = "encode_image") -> str:
    inputs = pixels() if method == "encode_image" else tokens(clip)
    return str(jax.make_jaxpr(lambda params, x: clip.apply({"params": params}, x, method=method))(params, inputs))


@pytest.mark.parametrize(
    ("rules", "quick_gelu", "activations", "budget"),
    [
        pytest.param("Q-ALL", False, "A32", 2e-6, marks=pytest.mark.slow),
        pytest.param("Q-FFN", True, "A32", 2e-6, marks=pytest.mark.slow),
        ("Q-ALL", True, "A16", 5e-5),
        ("Q-FFN", False, "A8", 5e-3),
        ([(MLP, Quantizer(group=32)), (ATTENTION, Quantizer(kind="uniform", bits=4))], True, "A32", 2e-6),
    ],
)
def test_both_towers_equal_the_modules(rules: Any, quick_gelu: bool, activations: Any, budget: float) -> None:
    clip, native, plain = build(rules, activations, quick_gelu=quick_gelu)
    for method, inputs in (("encode_image", pixels()), ("encode_text", tokens(clip))):
        assert "tclip_attention" in program(clip, native, method)
        assert "tclip_attention" not in program(clip, plain, method)
        results = [clip.apply({"params": params}, inputs, method=method) for params in (native, plain)]
        np.testing.assert_allclose(*results, atol=budget)


@pytest.mark.parametrize(
    ("rules", "options", "image"),
    [
        ("Q-FFN", {}, True),
        ("Q-ALL", {"vision_cfg": {"ls_init_value": 0.1}}, False),
        ([(MLP, Quantizer(group=32)), (ATTENTION, Quantizer(kind="uniform", bits=4))], {}, True),
        ([(ATTENTION, Quantizer(kind="uniform", bits=4))], {}, False),
        ((), {}, False),
    ],
)
def test_the_attention_of_each_tower_is_the_one_that_is_named(rules: Any, options: Any, image: bool) -> None:
    tiny = model_cfg("tiny")
    config = CLIPConfig.from_open_clip(tiny | {key: tiny[key] | cfg for key, cfg in options.items()})
    clip = CLIP(config)
    packed = pack_params(
        jax.device_get(init_params(clip, jax.random.key(0))), ternary_rules(rules, Quantizer(group=32))
    )
    native = [
        "tclip_attention" in program(clip, repack_params(packed), f"encode_{tower}") for tower in ("image", "text")
    ]
    named = {row["tower"]: row["implementation"] for row in inspect_runtime(config, packed)["attention"]}
    assert named == {tower: "native_cpu" if it else "reference" for tower, it in zip(named, native, strict=True)}
    assert native == [image, image or bool(options)]


@pytest.mark.slow
def test_vmap_and_gradients_are_those_of_the_modules() -> None:
    clip, native, plain = build()

    def encode(params: Tree, x: jax.Array) -> Any:
        return clip.apply({"params": params}, x, method="encode_image")

    boxes = pixels(4).reshape(2, 2, *image_size(), 3)
    each = jax.vmap(encode, (None, 0))(native, boxes)
    np.testing.assert_allclose(each.reshape(4, -1), encode(native, boxes.reshape(4, *image_size(), 3)), atol=2e-6)
    toward = jax.random.normal(jax.random.key(3), (3, clip.config.embed_dim))
    slopes = [jax.grad(lambda x, p=p: (encode(p, x) * toward).sum())(pixels()) for p in (native, plain)]
    np.testing.assert_allclose(*slopes, atol=2e-6 * np.abs(slopes[1]).max() + 1e-7)
    biases = [
        jax.grad(lambda bias, p=p: (encode(with_bias(p, bias), pixels()) * toward).sum(), allow_int=True)(bias_of(p))
        for p in (native, plain)
    ]
    assert np.abs(biases[1]).max() > 0
    np.testing.assert_allclose(*biases, atol=1e-5 * np.abs(biases[1]).max())


def bias_of(params: Tree) -> Any:
    return params["image"]["blocks"]["mlp"]["fc1"]["bias"]


def with_bias(params: Tree, bias: Any) -> Tree:
    copy = jax.tree.map(lambda leaf: leaf, params)
    copy["image"]["blocks"]["mlp"]["fc1"]["bias"] = bias
    return copy


@pytest.mark.slow
def test_modules_serve_what_the_block_cannot() -> None:
    """Recorded activations, LayerScale, bfloat16, trits that are not packed, and several devices."""
    clip, native, plain = build()
    outputs, states = apply_with_states(clip, native, pixels(), tokens(clip), towers=("image",), kinds=("hidden",))
    assert states["image"]["hidden"].shape[0] == clip.config.vision.layers
    np.testing.assert_allclose(outputs[0], clip.apply({"params": plain}, pixels(), method="encode_image"), atol=2e-6)
    assert "tclip_attention" not in program(clip.clone(dtype=jnp.bfloat16), native)
    scaled = model_cfg("tiny")["vision_cfg"] | {"ls_init_value": 0.5}
    clip, native, _ = build(vision_cfg=scaled)
    assert "tclip_attention" not in program(clip, native) and "tclip_ternary_matmul" in program(clip, native)


def test_a_mesh_of_several_devices_takes_the_modules() -> None:
    clip, native, plain = build()
    with jax.set_mesh(make_mesh(data=8)):
        assert "tclip_attention" not in program(clip, native)
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        assert "tclip_attention" in program(clip, native)
        result = jax.jit(lambda x: clip.apply({"params": native}, x, method="encode_image"))(pixels())
    np.testing.assert_allclose(result, clip.apply({"params": plain}, pixels(), method="encode_image"), atol=2e-6)
