"""The table of parameters, against numbers computed by hand."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

from tclip_jax.models.summary import parameter_rows, parameter_table
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
path                            shape           size  dtype     sharding              ternary
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
        "ternary": "k=2 group=channel",
    }
    assert [row["ternary"] for row in rows[1:]] == ["", "", ""]
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
