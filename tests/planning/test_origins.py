"""Names and source lines of arrays: snippets of a program, and a compiled function."""

from __future__ import annotations

import pytest

from tclip_jax.planning.hlo import parse_program
from tclip_jax.planning.origins import Origin, Origins, readable, source_lines

# ruff: noqa: E501
_TABLES = """\
FileNames
1 "/home/a/train.py"
2 "/site-packages/tclip_jax/models/text.py"
3 "/site-packages/flax/linen/normalization.py"

FunctionNames
1 "main"

FileLocations
1 {file_name_id=1 function_name_id=1 line=17 end_line=17 column=8 end_column=8}
2 {file_name_id=2 function_name_id=1 line=44 end_line=44 column=8 end_column=8}
3 {file_name_id=3 function_name_id=1 line=512 end_line=512 column=8 end_column=8}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

"""
_PROGRAM = (
    _TABLES
    + """\
%fused (p0: f32[12,8], p1: f32[8], p2: s32[]) -> (f32[12,8], f32[8]) {
  %p0 = f32[12,8]{1,0} parameter(0)
  %p1 = f32[8]{0} parameter(1)
  %p2 = s32[] parameter(2)
  %tanh.1 = f32[8]{0} tanh(%p1), metadata={op_name="jit(step)/jvp(CLIP)/text/while/body/blocks/mlp/tanh" stack_frame_id=3}
  %bitcast.1 = f32[1,8]{1,0} bitcast(%tanh.1)
  %dynamic-update-slice.1 = f32[12,8]{1,0} dynamic-update-slice(%p0, %bitcast.1, %p2, %p2), metadata={op_name="jit(step)/jvp(CLIP)/text/while/body/dynamic_update_slice" stack_frame_id=2}
  ROOT %tuple.0 = (f32[12,8]{1,0}, f32[8]{0}) tuple(%dynamic-update-slice.1, %p1)
}

%cond (c: (s32[], f32[12,8], f32[8])) -> pred[] {
  %c = (s32[], f32[12,8]{1,0}, f32[8]{0}) parameter(0)
  ROOT %lt = pred[] constant(true)
}

%body (b: (s32[], f32[12,8], f32[8])) -> (s32[], f32[12,8], f32[8]) {
  %b = (s32[], f32[12,8]{1,0}, f32[8]{0}) parameter(0)
  %gte.0 = s32[] get-tuple-element(%b), index=0
  %gte.1 = f32[12,8]{1,0} get-tuple-element(%b), index=1
  %gte.2 = f32[8]{0} get-tuple-element(%b), index=2
  %fusion.1 = (f32[12,8]{1,0}, f32[8]{0}) fusion(%gte.1, %gte.2, %gte.0), kind=kLoop, calls=%fused
  %gte.3 = f32[12,8]{1,0} get-tuple-element(%fusion.1), index=0
  ROOT %tuple.1 = (s32[], f32[12,8]{1,0}, f32[8]{0}) tuple(%gte.0, %gte.3, %gte.2)
}

ENTRY %main (x: f32[8]) -> f32[12,8] {
  %x = f32[8]{0} parameter(0), metadata={op_name="state.params[\\'clip\\'][\\'text\\'][\\'ln_final\\'][\\'bias\\']"}
  %zero = s32[] constant(0)
  %stack = f32[12,8]{1,0} broadcast(%zero), dimensions={}
  %copy-start.1 = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%x)
  %copy-done.1 = f32[8]{0} copy-done(%copy-start.1)
  %convert.1 = bf16[8]{0} convert(%copy-done.1)
  %tuple.2 = (s32[], f32[12,8]{1,0}, f32[8]{0}) tuple(%zero, %stack, %copy-done.1)
  %while.1 = (s32[], f32[12,8]{1,0}, f32[8]{0}) while(%tuple.2), condition=%cond, body=%body, metadata={op_name="jit(step)/while" stack_frame_id=1}
  ROOT %gte.9 = f32[12,8]{1,0} get-tuple-element(%while.1), index=1
}
"""
)
BIAS = Origin("state/params/clip/text/ln_final/bias")
TANH = Origin("jvp(CLIP)/text/while/body/blocks/mlp/tanh", "models/text.py:44")


@pytest.mark.parametrize(
    ("name", "index", "origin"),
    [
        ("x", (), BIAS),
        ("copy-done.1", (), BIAS),
        ("convert.1", (), BIAS),
        ("copy-start.1", (0,), BIAS),
        ("while.1", (2,), BIAS),  # the body does not change it
        ("b", (2,), BIAS),
        ("p1", (), BIAS),
        ("fusion.1", (1,), BIAS),
        ("while.1", (1,), TANH),  # the body stores it in a slice
        ("gte.9", (), TANH),
        ("dynamic-update-slice.1", (), TANH),
        ("tanh.1", (), TANH),
        ("zero", (), Origin("zero")),
        ("absent", (3,), Origin("absent")),
    ],
)
def test_arrays_are_named_by_what_makes_them(name: str, index: tuple[int, ...], origin: Origin) -> None:
    origins = Origins(parse_program(_PROGRAM), _PROGRAM)
    assert origins.find(name, index) == origin
    assert origins.is_input(name) == (name == "x")


def test_a_line_of_another_library_stands_for_the_line_of_ours_that_calls_it() -> None:
    assert source_lines(_PROGRAM) == {2: "models/text.py:44", 3: "models/text.py:44"}
    assert source_lines("HloModule step\n") == {}


def test_names_of_inputs_are_paths() -> None:
    name = r"state.optimizer[1].mu[\'clip\'][\'image\'][\'blocks\'][\'mlp\'][\'fc1\'][\'kernel\']"
    assert readable(name) == "state/optimizer/1/mu/clip/image/blocks/mlp/fc1/kernel"
    assert readable("batch['image']") == "batch/image" and readable("teacher_params") == "teacher_params"
    assert readable("jit(train_step)/jvp(CLIP)/dot.1") == "jvp(CLIP)/dot.1"
