"""Parsing of the text of compiled programs."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from tclip_jax.planning.hlo import Array, Execution, executions, parse_program, trip_count


def test_the_bound_of_a_loop_is_its_trip_count(loop: str) -> None:
    program = parse_program(loop)
    assert program.entry == "main" and len(program.computations) == 7
    # Fused computations are not listed.
    assert list(executions(program)) == [Execution("main", 1), Execution("body", 12)]


@pytest.mark.parametrize(("start", "times"), [(0, 12), (5, 7), (13, 0)])
def test_a_counter_need_not_start_at_zero(loop: str, start: int, times: int) -> None:
    text = loop.replace("%constant.5 = s32[]{:T(128)} constant(0)", f"%constant.5 = s32[]{{:T(128)}} constant({start})")
    assert list(executions(parse_program(text)))[1].times == times


def test_a_loop_without_a_bound_is_an_error(loop: str) -> None:
    text = loop.replace("%constant.4 = s32[]{:T(128)} constant(12)", "%constant.4 = s32[]{:T(128)} partition-id()")
    with pytest.raises(ValueError, match=r"the loop while\.1 of the compiled program has no known bound"):
        list(executions(parse_program(text)))


@pytest.mark.parametrize(
    ("text", "expected", "size"),
    [
        ("bf16[12,64,32]{2,1,0:T(8,128)(2,1)}", Array("bf16", (12, 64, 32)), 49152),
        ("f32[128]{0:T(128)S(1)}", Array("f32", (128,), on_chip=True), 512),
        ("pred[]", Array("pred", ()), 1),
        ("s2[6]{0}", Array("s2", (6,)), 2),
        ("f8e4m3fn[5]{0}", Array("f8e4m3fn", (5,)), 5),
    ],
)
def test_arrays(single: Callable[[str], str], text: str, expected: Array, size: int) -> None:
    program = parse_program(single(f"%a.1 = {text} custom-call(%x)"))
    assert program.computations["main"]["a.1"].arrays == (expected,)
    assert expected.bytes == size


def test_tuples_with_comments_and_names_that_look_like_headers(loop: str) -> None:
    body = parse_program(loop).computations["body"]
    assert body["fusion.2"].opcode == "fusion" and len(body["fusion.2"].arrays) == 3
    assert body["fusion.3"].operands == ("get-tuple-element.8", "get-tuple-element.9", "get-tuple-element.10")
    assert body["negate.1"].operands == ("get-tuple-element.6",)
    assert [name for name, each in body.items() if each.is_root] == ["tuple.1"]


def test_a_text_without_an_entry() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_program("HloModule nothing")


def test_a_program_for_cpus() -> None:
    def step(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, _: (jnp.sin(carry) @ carry, None), x, length=5)[0]

    program = parse_program(jax.jit(step).lower(jnp.ones((8, 8))).compile().as_text())
    times = [execution.times for execution in executions(program)]
    assert times[0] == 1 and max(times) == 5
    loops = [
        (instruction, computation)
        for computation in program.computations.values()
        for instruction in computation.values()
        if instruction.opcode == "while"
    ]
    assert [trip_count(program, *loop) for loop in loops] == [5]
