"""The formulas of operations, against the program itself and XLA's count."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval as pe

from tclip_jax.models.clip import CLIP, param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.flops import image_flops, peak_flops, text_flops, train_flops
from tclip_jax.models.presets import model_cfg


def config_of(layers: int) -> CLIPConfig:
    return CLIPConfig(
        24,
        VisionConfig((16, 24), patch_size=8, width=64, layers=layers, head_width=16),
        TextConfig(context_length=9, vocab_size=64, width=96, heads=4, layers=layers, mlp_ratio=3.0),
    )


def dot_flops(jaxpr: Any) -> int:
    """Operations of all dot_general in a program; the body of a scan counts once per iteration."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(dot_flops(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return total


def arguments(config: CLIPConfig, rows: int = 2) -> tuple[Any, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    images = jax.ShapeDtypeStruct((rows, *config.vision.image_size, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((rows, config.text.context_length), jnp.int32)
    return param_shapes(config), images, tokens


@pytest.mark.parametrize("config", [config_of(3), CLIPConfig.from_open_clip(model_cfg("ViT-B-16"))])
def test_forward_counts_every_product_of_matrices(config: CLIPConfig) -> None:
    params, images, tokens = arguments(config)
    for method, inputs, flops in (("encode_image", images, image_flops), ("encode_text", tokens, text_flops)):
        program = jax.make_jaxpr(lambda p, x, m=method: CLIP(config).apply({"params": p}, x, method=m))(params, inputs)
        assert dot_flops(program.jaxpr) == 2 * flops(config)


@pytest.mark.parametrize("remat", [False, True])
def test_training_counts_the_products_of_the_backward_pass(remat: bool) -> None:
    """The formula counts some products that the program lacks.

    These are the gradient with respect to the pixels and, with remat, the recomputation of the projections and of the
    last product of each block.
    """
    config = config_of(3)
    params, images, tokens = arguments(config)

    def total(params: Any, images: jax.Array, tokens: jax.Array) -> jax.Array:
        image, text, _ = CLIP(config, remat=remat).apply({"params": params}, images, tokens)  # type: ignore[misc]
        return image.sum() + text.sum()

    traced = jax.make_jaxpr(jax.grad(total))(params, images, tokens).jaxpr
    used, _ = pe.dce_jaxpr(traced, [True] * len(traced.outvars))  # XLA removes unused operations too
    counted = dot_flops(used) / 2
    patch, projections = 2 * 6 * 3 * 8**2 * 64, 2 * 24 * (64 + 96)
    last_of_blocks = 3 * (2 * 7 * 64 * 256 + 2 * 9 * 96 * 288)
    assert counted == train_flops(config, remat=remat) - patch - remat * (projections + last_of_blocks)


def test_xla_counts_as_many_in_a_model_without_a_scan() -> None:
    """One layer, because XLA counts the body of a scan once. Softmax, LayerNorm and GELU are the rest."""
    config = CLIPConfig(
        64,
        VisionConfig((64, 64), patch_size=16, width=768, layers=1),
        TextConfig(context_length=16, vocab_size=64, width=768, layers=1),
    )
    counted = jax.jit(lambda p, x, t: CLIP(config).apply({"params": p}, x, t)).lower(*arguments(config)).cost_analysis()
    assert counted["flops"] == pytest.approx(2 * (image_flops(config) + text_flops(config)), rel=0.02)


def test_known_models() -> None:
    """GFLOPs of an image and of a text from open_clip's docs/model_profile.csv."""
    base, large = (CLIPConfig.from_open_clip(model_cfg(name)) for name in ("ViT-B-16", "ViT-L-14"))
    for config, image, text in ((base, 35.13, 5.96), (large, 162.03, 13.3)):
        assert image_flops(config) / 1e9 == pytest.approx(image, rel=0.01)
        assert text_flops(config) / 1e9 == pytest.approx(text, rel=0.01)
    assert train_flops(base, large) == 3 * (image_flops(base) + text_flops(base)) + image_flops(large) + text_flops(
        large
    )
    assert text_flops(base, 77) == text_flops(base) > text_flops(base, 20)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v4", 275e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("cpu", None),
        ("TPU v50", None),
    ],
)
def test_peak_of_a_device(kind: str, peak: float | None) -> None:
    assert peak_flops(kind) == peak
