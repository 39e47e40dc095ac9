"""The table of parameters, against numbers computed by hand."""

from __future__ import annotations

import json
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zstandard

from tclip_jax.artifacts.coding import encode
from tclip_jax.artifacts.pack import flatten, pack_params
from tclip_jax.cli import main
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import model_cfg
from tclip_jax.models.summary import parameter_rows, parameter_table, size_rows
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.ternary import Quantizer

PARAMS = {
    "logit_scale": jax.ShapeDtypeStruct((), jnp.float32),
    "image": {"blocks": {"mlp": {"fc1": {"kernel": jax.ShapeDtypeStruct((2, 8, 250), jnp.bfloat16)}}}},
    "text": {
        "ln_final": {"bias": jax.ShapeDtypeStruct((999,), jnp.float32)},
        "token_embedding": {"embedding": jax.ShapeDtypeStruct((500, 10), jnp.float32)},
    },
}
TABLE = """\
path                            shape           size  dtype     sharding              quantizer
------------------------------  -----------  -------  --------  --------------------  -----------------
image/blocks/mlp/fc1/kernel     (2, 8, 250)    4,000  bfloat16  (None, None, 'fsdp')  k=1.5 group=32
logit_scale                     ()                 1  float32   ()
text/ln_final/bias              (999,)           999  float32   ()
text/token_embedding/embedding  (500, 10)      5,000  float32   ('fsdp', None)        k=1.5 group=32
all parameters: 10,000, of which ternary 9,000 (90.00%)
without the token embedding: 5,000, of which ternary 4,000 (80.00%)"""


def test_rows_say_all_of_each_parameter_and_are_json() -> None:
    rows = parameter_rows(PARAMS, ternary_rules("Q-FFN", Quantizer(group="channel")), make_mesh(4, 2))
    assert rows[0] == {
        "path": "image/blocks/mlp/fc1/kernel",
        "shape": (2, 8, 250),
        "size": 4000,
        "dtype": "bfloat16",
        "sharding": "(None, None, 'fsdp')",
        "quantizer": "k=2 group=channel",
        "bits": 2,
    }
    assert [(row["quantizer"], row["bits"]) for row in rows[1:]] == [("", None)] * 3
    assert [row["path"] for row in json.loads(json.dumps(rows))] == [row["path"] for row in rows]


def test_table() -> None:
    table = parameter_table(parameter_rows(PARAMS, ternary_rules("Q-ALL", Quantizer(1.5, 32)), make_mesh(4, 2)))
    assert [" ".join(line.split()) for line in table.splitlines()[2:]] == [
        " ".join(line.split()) for line in TABLE.splitlines()[2:]
    ]
    header, rule, *body = table.splitlines()
    # Columns start at their headers; the column of numbers ends there.
    for name in ("shape", "dtype", "sharding"):
        assert all(line[header.index(name) - 2 : header.index(name)] == "  " for line in body[:4])
    assert all(line[header.index("size") + 3] != " " and line[header.index("size") + 4] == " " for line in body[:4])
    assert set(rule) == {"-", " "} and not any(line.endswith(" ") for line in table.splitlines())


@pytest.mark.parametrize(("fsdp", "sharding"), [(2, "(None, None, 'fsdp')"), (4, "(None, None, None)")])
def test_an_axis_that_does_not_divide_is_shown_as_not_sharded(fsdp: int, sharding: str) -> None:
    assert (
        parameter_rows(PARAMS, (), make_mesh(-1, fsdp))[0]["sharding"] == sharding
    )  # four devices do not divide 250 columns


def test_sizes_with_and_without_a_ternary_token_embedding() -> None:
    # fc1 has 4,000 weights in 800 bytes, and 250 outputs of 2 layers with a scale each; the embedding has 500 rows.
    full, blocks, whole = size_rows(PARAMS, Quantizer())
    assert full == {"weights": "full precision", "parameters": 10000, "quantized": 0} | {
        "float32_bytes": 40000,
        "float16_bytes": 20000,
    }
    assert blocks["quantized"] == 4000 and blocks["float32_bytes"] == 800 + 2 * 500 + 4 * 6000
    assert whole["quantized"] == 9000 and whole["float16_bytes"] == 800 + 2 * 500 + 1000 + 2 * 500 + 2 * 1000


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_counted_apart(bits: Literal[4, 8]) -> None:
    rules = (("text/token_embedding/embedding", Quantizer(kind="uniform", bits=bits)), (".*", Quantizer()))
    table = parameter_table(parameter_rows(PARAMS, rules, make_mesh(4, 2)))
    assert f"all parameters: 10,000, of which ternary 4,000 (40.00%), {bits} bits 5,000 (50.00%)" in table
    assert f"uniform bits={bits} group=256" in table
    whole = size_rows(PARAMS, Quantizer(kind="uniform", bits=bits))[2]
    assert whole["float16_bytes"] == 9000 * bits // 8 + 2 * 500 + 2 * 500 + 2 * 1000


@pytest.mark.parametrize("quantizer", [Quantizer(), Quantizer(kind="uniform", bits=4), Quantizer(kind="uniform")])
def test_sizes_are_those_of_an_artifact(quantizer: Quantizer) -> None:
    config = CLIPConfig.from_open_clip(model_cfg("tiny"))
    rules = ternary_rules("Q-ALL", quantizer)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), param_shapes(config))
    arrays = {
        name: array
        for path, leaf in flatten(pack_params(params, rules)).items()
        for name, array in encode(path, leaf, "float16")[1].items()
    }
    stored = sum(len(zstandard.decompress(array.tobytes())) for array in arrays.values())
    assert stored == size_rows(params, quantizer)[2]["float16_bytes"]


def test_what_does_not_change_sizes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", "--preset", "tiny", "--config.ternary=Q-FFN"]) == 2
    assert (
        "--config.ternary does not change these sizes: with --preset, only model and quantizer do"
        in capsys.readouterr().err
    )
    assert main(["params", "--preset", "tiny", "--config.model.vision_cfg.layers=1"]) == 0
