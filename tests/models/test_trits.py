"""Metrics of trits against NumPy, layer by layer."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from tclip_jax.models.ternary_rules import ATTENTION, MLP, PATCH_EMBEDDING, TOKEN_EMBEDDING
from tclip_jax.models.trits import HISTOGRAM_EDGES, trit_metrics, trit_snapshot
from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.parallel.sharding import tree_shardings
from tclip_jax.runs.record import read_metrics
from tclip_jax.ternary import Quantizer
from tclip_jax.training.metrics import Telemetry

RULES = (
    (MLP, Quantizer(group=16)),
    (ATTENTION, Quantizer(group="channel", kind="lsq")),
    (TOKEN_EMBEDDING, Quantizer(group="tensor")),
    (PATCH_EMBEDDING, Quantizer(group=16)),
)
FC1, QKV = "image/blocks/mlp/fc1/kernel", "text/blocks/attention/qkv/kernel"


def params(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    return {
        "image": {
            "blocks": {"mlp": {"fc1": {"kernel": draw(2, 32, 6)}}},
            "patch_embedding": {"kernel": draw(4, 4, 3, 5)},
        },
        "text": {
            "token_embedding": {"embedding": draw(7, 8)},
            "blocks": {"attention": {"qkv": {"kernel": draw(1, 8, 6), "kernel_scale": np.abs(draw(1, 1, 6))}}},
        },
        "logit_scale": np.float32(1),
    }


def test_metrics_are_those_of_the_step() -> None:
    old, new = params(0), params(1)
    before = trit_snapshot(old, RULES)
    after, metrics = trit_snapshot(new, RULES), trit_metrics(before, new, RULES)
    assert metrics.keys() == {FC1, QKV, "text/token_embedding/embedding", "image/patch_embedding/kernel"}
    leaves = flatten_dict(new, sep="/")
    for path in (FC1, QKV):
        w = leaves[path]
        trits, was = np.asarray(after[path].trits), np.asarray(before[path].trits)
        scale, group = np.asarray(after[path].scale), after[path].group
        level = np.repeat(scale, group, 1)[:, : w.shape[1]]
        x = np.abs(w) / level
        for layer in range(len(w)):
            values = {name: np.asarray(value)[layer] for name, value in metrics[path].items()}
            expected = {
                "zeros": np.mean(trits[layer] == 0),
                "flips": np.mean(trits[layer] != was[layer]),
                "scale": scale[layer].mean(),
                "drift": np.abs(scale[layer] - np.asarray(before[path].scale)[layer]).mean() / scale[layer].mean(),
                "saturated": np.mean(x[layer] > 1),
            }
            for name, value in expected.items():
                np.testing.assert_allclose(values[name], value, rtol=1e-5, err_msg=f"{path} {name}")
            counts, _ = np.histogram(x[layer], (*HISTOGRAM_EDGES[:-1], HISTOGRAM_EDGES[-1], np.inf))
            np.testing.assert_allclose(values["histogram"], counts / x[layer].size, atol=1e-6)
    np.testing.assert_array_equal(trit_metrics(after, new, RULES)[FC1]["flips"], 0)


def test_of_a_large_weight_every_nth_output_is_taken() -> None:
    old, new = params(0), params(1)
    whole, part = trit_snapshot(new, RULES), trit_snapshot(new, RULES, 50)
    np.testing.assert_array_equal(part[FC1].trits, whole[FC1].trits[..., ::4])  # 32 x 6 weights, above the limit
    np.testing.assert_array_equal(part[FC1].scale, whole[FC1].scale[..., ::4])
    np.testing.assert_array_equal(part[QKV].trits, whole[QKV].trits)  # 8 x 6 weights, below the limit
    metrics = trit_metrics(trit_snapshot(old, RULES, 50), new, RULES, 50)
    flips = np.mean(part[FC1].trits != np.asarray(trit_snapshot(old, RULES, 50)[FC1].trits), axis=(1, 2))
    np.testing.assert_allclose(metrics[FC1]["flips"], flips, rtol=1e-6)
    np.testing.assert_allclose(np.sum(metrics[FC1]["histogram"], -1), 1, rtol=1e-6)


def test_of_sharded_weights_every_process_can_read_the_same() -> None:
    old, new, mesh = params(0), params(1), make_mesh(4, 2)
    placed = [jax.device_put(tree, tree_shardings(tree, mesh)) for tree in (old, new)]
    with jax.set_mesh(mesh):
        metrics = trit_metrics(trit_snapshot(placed[0], RULES), placed[1], RULES)
    assert "fsdp" in placed[1]["image"]["blocks"]["mlp"]["fc1"]["kernel"].sharding.spec
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(metrics))
    expected = trit_metrics(trit_snapshot(old, RULES), new, RULES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), metrics, expected)


def test_a_look_is_one_line_of_the_metrics(tmp_path: pathlib.Path) -> None:
    metrics = trit_metrics(trit_snapshot(params(0), RULES), params(1), RULES)
    with Telemetry(tmp_path, first_step=0, steps=2, title="t") as telemetry:
        telemetry.write(1, {"loss": 1.0})
        telemetry.write_trits(1, metrics)
    lines = read_metrics(tmp_path)
    assert [line.keys() for line in lines] == [{"step", "loss"}, {"step", "trits"}]
    assert lines[1]["trits"][FC1]["zeros"] == np.round(np.float64(metrics[FC1]["zeros"]), 6).tolist()
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert all(f"{name}/{FC1}".encode() in events for name in ("zeros", "flips", "saturated", "latent"))
