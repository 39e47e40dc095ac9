"""Bytes to and from the main memory, of programs small enough to count by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tclip_jax.planning.collectives import memory_traffic
from tclip_jax.planning.hlo import parse_program


def test_a_loop_reads_a_slice_a_trip_and_nothing_that_stays_on_the_chip(loop: str) -> None:
    slices = 12 * 64 * 32 * 2  # into the chip's own memory, so they are not written
    negations = 12 * 2 * 8 * 128 * 4
    scattered = (8 * 128 + 4 * 128) * 4
    counters = 8 + 12 * 4  # copied before the loop, and read by each slice
    assert memory_traffic(parse_program(loop)) == slices + negations + scattered + counters


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("f32[2]{0} negate(%x)", 16),
        ("f32[2]{0:T(128)S(1)} negate(%x)", 8),
        ("f32[1]{0} dynamic-slice(%x), dynamic_slice_sizes={1}", 8),
        ("(f32[2]{0:S(1)}, f32[2]{0}, u32[]{:S(2)}) copy-start(%x)", 8),
        ("((f32[2]{0}), f32[1]{0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:1]}", 4),
        ("f32[2]{0} bitcast(%x)", 0),
        ("f32[2]{0} copy-done(%x)", 0),
    ],
)
def test_instructions(single: Callable[[str], str], line: str, moved: int) -> None:
    assert memory_traffic(parse_program(single(f"%a.1 = {line}"))) == moved


UPDATE = """\
%update (p.0: f32[12,8], p.1: f32[8], p.2: s32[]) -> f32[12,8] {
  %p.0 = f32[12,8]{1,0} parameter(0)
  %p.1 = f32[8]{0} parameter(1)
  %p.2 = s32[] parameter(2)
  %c.0 = s32[] constant(0)
  %b.0 = f32[1,8]{1,0} bitcast(%p.1)
  ROOT %u.0 = f32[12,8]{1,0} dynamic-update-slice(%p.0, %b.0, %p.2, %c.0)
}

%outer (p.3: f32[12,8], p.4: f32[8], p.5: s32[]) -> (f32[12,8], f32[8]) {
  %p.3 = f32[12,8]{1,0} parameter(0)
  %p.4 = f32[8]{0} parameter(1)
  %p.5 = s32[] parameter(2)
  %f.0 = f32[12,8]{1,0} fusion(%p.3, %p.4, %p.5), kind=kLoop, calls=%update
  ROOT %t.0 = (f32[12,8]{1,0}, f32[8]{0}) tuple(%f.0, %p.4)
}

ENTRY %main (a: f32[12,8], b: f32[8], i: s32[]) -> (f32[12,8], f32[8]) {
  %a = f32[12,8]{1,0} parameter(0)
  %b = f32[8]{0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f.1 = (f32[12,8]{1,0}, f32[8]{0}) fusion(%a, %b, %i), kind=kLoop, calls=%CALLED
}
"""


@pytest.mark.parametrize("called", ["update", "outer"])
def test_an_update_in_place_moves_what_it_changes(called: str) -> None:
    update, index = 8 * 4, 4
    assert memory_traffic(parse_program(UPDATE.replace("CALLED", called))) == 2 * update + index
