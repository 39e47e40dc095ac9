"""Every loss of the configuration has its function's value, and a gradient for the student."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tclip_jax.losses import contrastive, distillation
from tclip_jax.losses.features import hidden_matching, relation_matching
from tclip_jax.losses.statistics import compare, compare_rows
from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.layers import Softness, blend_params
from tclip_jax.models.taps import apply_with_states
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.runs.config import LossConfig
from tclip_jax.ternary import Quantizer
from tclip_jax.training.objective import Embeddings, Encoders, Objective, check_teacher, init_heads, same_depth

VISION, TEXT = VisionConfig((16, 16), patch_size=8, width=16, layers=2, head_width=8), TextConfig(6, 32, 16, 2, 2)
STUDENT = CLIPConfig(12, VISION, TEXT)
TEACHER = CLIPConfig(20, VisionConfig((16, 16), 8, 32, 4, 8), TextConfig(6, 32, 24, 2, 3))
MEAN, STD, HALF = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), (0.5, 0.5, 0.5)
RULES = ternary_rules("Q-ALL", Quantizer(group=16))
RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.integers(0, 256, (4, 16, 16, 3), np.uint8),
    "tokens": np.array([[3, 4, 31, 0, 0, 0], [1, 31, 5, 5, 5, 5], [2, 2, 2, 2, 2, 31], [0, 31, 0, 0, 0, 0]], np.int32),
    "weight": np.array([1, 1, 1, 0], np.float32),
}
CLIP_STUDENT, CLIP_TEACHER = CLIP(STUDENT, RULES), CLIP(TEACHER)
STUDENT_ENCODERS = Encoders(CLIP_STUDENT, MEAN, STD)


@functools.cache
def params() -> tuple[Any, Any]:
    draw = jax.jit(init_params, static_argnums=0)
    return draw(CLIP_STUDENT, jax.random.key(0)), draw(CLIP_TEACHER, jax.random.key(1))


@functools.cache
def outputs() -> tuple[Any, Any]:
    """Returns embeddings and all states of both models, each with its own pixel statistics."""
    both = []
    for clip, tree, mean, std in zip((CLIP_STUDENT, CLIP_TEACHER), params(), (MEAN, HALF), (STD, HALF), strict=True):
        pixels = (np.float32(BATCH["image"]) / 255 - np.float32(mean)) / np.float32(std)
        run = jax.jit(
            lambda tree, pixels, clip=clip: apply_with_states(
                clip, tree, pixels, BATCH["tokens"], ("image", "text"), ("hidden", "qkv")
            )
        )
        both.append(run(tree, pixels))
    return both[0], both[1]


def loss_of(tree: Any, teacher_params: Any, objective: Objective, batch: Any = BATCH, quant_lambda: Any = None) -> Any:
    softness = None if quant_lambda is None else Softness(quant_lambda)
    return objective.loss(tree, teacher_params, batch, *objective.encode(tree, teacher_params, batch, batch, softness))


def run(loss: LossConfig) -> tuple[Any, dict[str, Any]]:
    """Returns gradients, parameters and metrics of the objective, from one jitted call."""
    clip, teacher_params = params()
    tree = {"clip": clip, "heads": init_heads(jax.random.key(2), STUDENT, TEACHER, loss)}

    def gradients(tree: Any, teacher_params: Any) -> Any:
        objective = Objective(STUDENT_ENCODERS, Encoders(CLIP_TEACHER, HALF, HALF), loss)
        return jax.grad(loss_of, has_aux=True)(tree, teacher_params, objective)

    gradient, metrics = jax.jit(gradients)(tree, teacher_params)
    return (gradient, tree), {name: float(value) for name, value in metrics.items()}


def unit(x: Any) -> Any:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.slow
def test_every_loss_equals_its_function_and_they_add_up() -> None:
    (ours, states), (theirs, teacher_states) = outputs()
    weights = {"task": 1.0, "crd": 0.5, "icl": 0.25, "fd": 2.0, "open_clip": 0.75, "affinity": 0.5, "kl": 1.5}
    weights |= {"hidden": 0.7, "relations": 0.9, "vrd": 0.3, "xrd": 0.6}
    kinds = {"task_kind": "sigmoid", "fd_kind": "cosine", "hidden_kind": "mse", "positives": "equal_text"}
    loss = LossConfig(**weights, **kinds, kl_reverse=0.3, relation_heads=2, layers=(0, -1))  # type: ignore[arg-type]
    (gradients, tree), metrics = run(loss)
    heads, weight = tree["heads"], BATCH["weight"]
    how = {"tokens": BATCH["tokens"], "weight": weight}
    rows = compare(*ours, teacher=theirs, bias=-10.0, **how)
    to_image, to_text = (
        unit(np.asarray(x) @ heads[name]["kernel"] + heads[name]["bias"])
        for name, x in (("image", ours[0]), ("text", ours[1]))
    )
    valid = {"image": np.repeat(weight[:, None] > 0, 5, 1), "text": np.arange(6) <= BATCH["tokens"].argmax(1)[:, None]}
    valid["text"] &= weight[:, None] > 0
    hidden, relations = [], []
    for tower, pairs in (("image", ((0, 1), (1, 3))), ("text", ((0, 1), (1, 2)))):
        for i, j in pairs:
            head = heads["hidden"][tower]
            projected = states[tower]["hidden"][i] @ head["kernel"] + head["bias"]
            hidden.append(hidden_matching(projected, teacher_states[tower]["hidden"][j], "mse", valid[tower]))
            a, b = (jnp.split(each[tower]["qkv"][k], 3, -1) for each, k in ((states, i), (teacher_states, j)))
            relations += [relation_matching(x, y, 2, valid[tower]) for x, y in zip(a, b, strict=True)]
    expected = {
        "task": contrastive.sigmoid_of_rows(rows[0]),
        "crd": distillation.crd_of_rows(*rows),
        "icl": contrastive.info_nce_of_rows(
            compare_rows(to_image, theirs[1], 2.659, **how), compare_rows(to_text, theirs[0], 2.659, **how)
        ),
        "fd": distillation.feature_distillation(to_image, theirs[0], "cosine", weight)
        + distillation.feature_distillation(to_text, theirs[1], "cosine", weight),
        "vrd": distillation.relational_agreement((to_image, theirs[0]), (to_text, theirs[1]), theirs[2], weight=weight),
        "xrd": distillation.relational_agreement((to_image, theirs[1]), (to_text, theirs[0]), theirs[2], weight=weight),
        "open_clip": distillation.open_clip_of_rows(*rows),
        "affinity": distillation.affinity_of_rows(*rows),
        "kl": distillation.kl_mix_of_rows(*rows, 0.3),
        "hidden": np.mean(hidden),
        "relations": np.mean(relations),
    }
    for name, value in expected.items():
        assert metrics[f"loss/{name}"] == pytest.approx(float(value), rel=2e-4), name
    assert metrics["loss"] == pytest.approx(sum(loss.weights[k] * metrics[f"loss/{k}"] for k in expected), rel=1e-5)
    for path, leaf in flatten_dict(gradients, sep="/").items():
        # Positions after the last valid token, and key biases, which a softmax cancels, have no gradient.
        assert np.isfinite(leaf).all() and (np.any(leaf) or path.endswith("bias")), path


def test_the_bias_of_the_model_is_that_of_the_sigmoid_loss() -> None:
    rng = np.random.default_rng(0)
    image, text = (unit(rng.standard_normal((len(BATCH["weight"]), 8)).astype(np.float32)) for _ in range(2))
    clip = {"logit_scale": jnp.float32(1.5), "logit_bias": jnp.float32(-3)}
    objective = Objective(STUDENT_ENCODERS, None, LossConfig(task_kind="sigmoid"))
    total, _ = objective.loss({"clip": clip}, None, BATCH, Embeddings(image, text), {})
    expected = contrastive.sigmoid_loss(image, text, np.exp(1.5), -3.0, weight=BATCH["weight"])
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_only_the_heads_of_weighted_losses_are_created() -> None:
    assert init_heads(jax.random.key(0), STUDENT, None, LossConfig()) == {}
    assert init_heads(jax.random.key(0), STUDENT, None, LossConfig(task_kind="sigmoid")).keys() == {"sigmoid_bias"}
    siglip = dataclasses.replace(STUDENT, init_logit_bias=-10.0)  # a model with a bias of its own
    assert init_heads(jax.random.key(0), siglip, None, LossConfig(task_kind="sigmoid")) == {}
    assert init_heads(jax.random.key(0), STUDENT, TEACHER, LossConfig(task=0, task_kind="sigmoid", crd=1.0)) == {}
    for terms, expected in (
        ({}, set()),
        ({"crd": 1.0, "kl": 1.0, "open_clip": 1.0, "affinity": 1.0, "relations": 1.0}, set()),
        ({"fd": 1.0}, {"image", "text"}),
        ({"icl": 1.0}, {"image", "text", "icl_scale"}),
        ({"hidden": 1.0}, {"hidden"}),
    ):
        assert init_heads(jax.random.key(0), STUDENT, TEACHER, LossConfig(**terms)).keys() == expected, terms
    hidden = init_heads(jax.random.key(0), STUDENT, TEACHER, LossConfig(hidden=1.0, towers=("text",)))["hidden"]
    assert {tower: head["kernel"].shape for tower, head in hidden.items()} == {"text": (16, 24)}


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(crd=1.0, affinity=0.5),  # losses without heads
        LossConfig(task=0.0, task_kind="sigmoid", crd=1.0),
        LossConfig(fd=1.0),
    ],
)
def test_losses_do_not_depend_on_the_heads_of_others(loss: LossConfig) -> None:
    tree = {"clip": params()[0]}
    if heads := init_heads(jax.random.key(2), STUDENT, 20, loss):
        tree["heads"] = heads
    everything = init_heads(jax.random.key(2), STUDENT, 20, LossConfig(task_kind="sigmoid", icl=1.0, fd=1.0))
    (ours, _), (theirs, _) = outputs()
    objective = Objective(STUDENT_ENCODERS, float(theirs[2]), loss)
    batch, embeddings = BATCH, Embeddings(ours[0], ours[1], (theirs[0], theirs[1]))
    few, many = (objective.loss(each, None, batch, embeddings, {}) for each in (tree, tree | {"heads": everything}))
    assert few[1].keys() == many[1].keys() and float(few[0]) == pytest.approx(float(many[0]), rel=1e-6)


def test_states_are_computed_only_for_losses_that_need_them() -> None:
    def jaxpr(loss: LossConfig) -> str:
        return str(jax.make_jaxpr(lambda tree: Encoders(CLIP_STUDENT, MEAN, STD)(tree, BATCH, loss))(params()[0]))

    assert "2,4,5,16" not in jaxpr(LossConfig()) and "2,4,5,16" in jaxpr(LossConfig(hidden=1.0))
    assert "2,4,6,48" not in jaxpr(LossConfig(relations=1.0, towers=("image",)))


def test_a_blended_student_reaches_the_ternary_loss_exactly() -> None:
    clip, _ = params()

    @jax.jit
    def loss(quant_lambda: Any) -> jax.Array:
        tree = clip if quant_lambda is None else blend_params(clip, RULES, Softness(quant_lambda))
        return loss_of({"clip": tree}, None, Objective(STUDENT_ENCODERS, None, LossConfig()))[0]

    @jax.jit
    def blended(quant_lambda: Any) -> jax.Array:
        return loss_of(
            {"clip": clip}, None, Objective(STUDENT_ENCODERS, None, LossConfig()), quant_lambda=quant_lambda
        )[0]

    assert blended(jnp.float32(1)) == loss(None)
    floats = loss_of({"clip": clip}, None, Objective(Encoders(CLIP(STUDENT), MEAN, STD), None, LossConfig()))[0]
    assert float(blended(jnp.float32(0))) == pytest.approx(float(floats), rel=1e-5) and floats != loss(None)


def test_cached_embeddings_give_the_losses_of_the_teacher_in_the_step() -> None:
    _, (theirs, _) = outputs()
    batch = BATCH | {"teacher_image": np.float16(theirs[0]), "teacher_text": np.float16(theirs[1])}
    terms = ("crd", "icl", "fd", "open_clip", "affinity", "kl", "vrd", "xrd")
    loss = LossConfig(**dict.fromkeys(terms, 1.0))  # type: ignore[arg-type]
    tree = {"clip": params()[0], "heads": init_heads(jax.random.key(2), STUDENT, 20, loss)}
    objectives = [
        Objective(STUDENT_ENCODERS, teacher, loss) for teacher in (Encoders(CLIP_TEACHER, HALF, HALF), float(theirs[2]))
    ]
    metrics = jax.jit(lambda tree, teacher, each: loss_of(tree, teacher, each, batch)[1], static_argnums=2)
    both = [metrics(tree, params()[1], each) for each in objectives]
    for name in (f"loss/{term}" for term in terms):
        assert float(both[0][name]) == pytest.approx(float(both[1][name]), abs=1e-3), name


@pytest.mark.parametrize(
    ("layers", "of", "expected"),
    [(2, 4, [1, 3]), (12, 24, [*range(1, 24, 2)]), (3, 3, [0, 1, 2]), (4, 2, [0, 0, 1, 1])],
)
def test_layers_are_compared_at_the_same_depth(layers: int, of: int, expected: list[int]) -> None:
    assert [same_depth(layer, layers, of) for layer in range(layers)] == expected
    assert same_depth(-1, layers, of) == of - 1


@pytest.mark.parametrize(
    ("teacher", "loss", "message"),
    [
        (
            CLIPConfig(8, VisionConfig((32, 32), 8), TEXT),
            LossConfig(),
            r"image size is \(32, 32\), the student's \(16, 16\)",
        ),
        (
            CLIPConfig(8, VISION, TextConfig(8, 32, 16, 2, 2)),
            LossConfig(),
            "texts have 8 of 32 tokens, the student's 6",
        ),
        (
            CLIPConfig(8, VISION, TextConfig(6, 40, 16, 2, 2)),
            LossConfig(),
            "texts have 6 of 40 tokens, the student's 6 of 32",
        ),
        (CLIPConfig(8, VisionConfig((16, 16), 4), TEXT), LossConfig(hidden=1.0), r"grid of \(4, 4\) patches"),
    ],
)
def test_a_teacher_that_does_not_fit_the_student_is_refused(
    teacher: CLIPConfig, loss: LossConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_teacher(teacher, STUDENT, loss)
    with pytest.raises(ValueError, match="the teacher"):
        check_teacher(STUDENT, teacher, loss)  # and the reverse
    check_teacher(TEACHER, STUDENT, LossConfig(hidden=1.0))
    width = STUDENT.vision.width
    with pytest.raises(
        ValueError, match=f"relation_heads is 7: it must divide {width}, the width of the student's image"
    ):
        check_teacher(TEACHER, STUDENT, LossConfig(relations=1.0, relation_heads=7))
    check_teacher(TEACHER, STUDENT, LossConfig(hidden=1.0, relation_heads=7))
