"""Texts of compiled programs, shortened from the output of libtpu, and a configuration to plan."""

from __future__ import annotations

from collections.abc import Callable

import ml_collections
import pytest

from tclip_jax.models.presets import model_cfg
from tclip_jax.runs.config import base_config

# ruff: noqa: E501
_LOOP = """\
HloModule jit_step, is_scheduled=true

%fused_slice (param_0.1: bf16[12,64,32], param_1.1: s32[]) -> bf16[64,32] {
  %param_0.1 = bf16[12,64,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = s32[]{:T(128)} parameter(1)
  %constant.0 = s32[]{:T(128)} constant(0)
  %dynamic-slice.1 = bf16[1,64,32]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0.1, %param_1.1, %constant.0, %constant.0), dynamic_slice_sizes={1,64,32}
  ROOT %bitcast.1 = bf16[64,32]{1,0:T(8,128)(2,1)} bitcast(%dynamic-slice.1)
}

%async_start (param_0.2: bf16[64,32]) -> (bf16[64,32], bf16[64,64], u32[]) {
  %param_0.2 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%param_0.2), channel_id=22, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="7"}, metadata={op_name="jit(step)/blocks/mlp/fc1" stack_frame_id=786}
  ROOT %custom-call.1 = (bf16[64,32]{1,0:T(8,128)(2,1)S(1)}, bf16[64,64]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_done (param_0.3: bf16[64,32], param_1.3: bf16[64,64], param_2.3: u32[]) -> bf16[64,64] {
  %param_0.3 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.3 = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %param_2.3 = u32[]{:S(2)} parameter(2)
  %all-gather.2 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%param_0.3), channel_id=22, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="7"}
  ROOT %custom-call.2 = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} custom-call(%param_0.3, %param_1.3, %all-gather.2, %param_2.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (input_0: f32[8,128]) -> f32[4,128] {
  %input_0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%input_0), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, use_global_device_ids=true, to_apply=%add
  %constant.1 = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.2 = f32[4,128]{1,0:T(4,128)} dynamic-slice(%all-reduce.1, %constant.1, %constant.1), dynamic_slice_sizes={4,128}
}

%cond (param.4: (s32[], f32[8,128], bf16[12,64,32])) -> pred[] {
  %constant.4 = s32[]{:T(128)} constant(12)
  %param.4 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, bf16[12,64,32]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.4 = s32[]{:T(128)} get-tuple-element(%param.4), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%get-tuple-element.4, %constant.4), direction=LT
}

%body (param.5: (s32[], f32[8,128], bf16[12,64,32])) -> (s32[], f32[8,128], bf16[12,64,32]) {
  %param.5 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, bf16[12,64,32]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.5 = s32[]{:T(128)} get-tuple-element(%param.5), index=0
  %get-tuple-element.6 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%param.5), index=1
  %get-tuple-element.7 = bf16[12,64,32]{2,1,0:T(8,128)(2,1)} get-tuple-element(%param.5), index=2
  %fusion.1 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.7, %get-tuple-element.5), kind=kLoop, calls=%fused_slice
  %fusion.2 = (bf16[64,32]{1,0:T(8,128)(2,1)S(1)}, bf16[64,64]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) fusion(%fusion.1), kind=kCustom, calls=%async_start
  %get-tuple-element.8 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%fusion.2), index=0
  %get-tuple-element.9 = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%fusion.2), index=1
  %get-tuple-element.10 = u32[]{:S(2)} get-tuple-element(%fusion.2), index=2
  %fusion.3 = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.8, %get-tuple-element.9, %get-tuple-element.10), kind=kCustom, calls=%async_done
  %negate.1 = f32[8,128]{1,0:T(8,128)} negate(%get-tuple-element.6), metadata={op_name="(not, a) computation -> {"}
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, bf16[12,64,32]{2,1,0:T(8,128)(2,1)}) tuple(%get-tuple-element.5, %negate.1, %get-tuple-element.7)
}

ENTRY %main (param.6: f32[8,128], param.7: bf16[12,64,32]) -> f32[4,128] {
  %param.6 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %param.7 = bf16[12,64,32]{2,1,0:T(8,128)(2,1)} parameter(1)
  %constant.5 = s32[]{:T(128)} constant(0)
  %copy.1 = s32[]{:T(128)} copy(%constant.5)
  %tuple.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, bf16[12,64,32]{2,1,0:T(8,128)(2,1)}) tuple(%copy.1, %param.6, %param.7)
  %while.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, bf16[12,64,32]{2,1,0:T(8,128)(2,1)}) while(%tuple.2), condition=%cond, body=%body
  %get-tuple-element.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
  ROOT %fusion.4 = f32[4,128]{1,0:T(4,128)} fusion(%get-tuple-element.1), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


@pytest.fixture
def loop() -> str:
    """Twelve trips of a loop with an asynchronous all-gather of a slice of weights, then a reduce-scatter."""
    return _LOOP


@pytest.fixture
def single() -> Callable[[str], str]:
    """Returns a program of one instruction with an operand %x."""
    return lambda instruction: (
        f"ENTRY %main (x: f32[2]) -> f32[2] {{\n  %x = f32[2]{{0}} parameter(0)\n  ROOT {instruction}\n}}\n"
    )


@pytest.fixture
def config() -> ml_collections.ConfigDict:
    """The tiny model, distilled from a teacher of the same architecture, in bfloat16."""
    config = base_config()
    config.teacher, config.ternary, config.dtype, config.remat = "tiny", "Q-ALL", "bfloat16", True
    config.loss.crd = 1.0
    config.data.batch_size = 64
    config.mesh.fsdp = 2
    config.model = model_cfg("tiny")
    return config
