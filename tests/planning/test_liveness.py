"""The peak of HBM: a short assignment of buffers, random ones against a map of bytes, and compiled functions."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tclip_jax.planning.hlo import Array, parse_program
from tclip_jax.planning.liveness import (
    Allocation,
    Assignment,
    Buffer,
    LiveArray,
    Peak,
    Result,
    dump_options,
    find_peak,
    read_assignment,
)

_ALLOCATIONS = """\
BufferAssignment:
allocation 0: size 512, thread-local:
 value: <8 reduce_sum.6 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 4096, parameter 3, shape |f32[2,64]| at ShapeIndex {}, maybe-live-out:
 value: <1 copy.3 @0> (size=4096,offset=0): f32[2,64]{1,0:T(8,128)}
 value: <2 x @0> (size=4096,offset=0): f32[2,64]{1,0:T(8,128)}
allocation 2: size 9000, color 1, preallocated-temp:
 value: <3 fusion.1{1} @1> (size=8192,offset=0): f32[8,256]{1,0:T(8,128)S(1)}
allocation 3: size 20480, preallocated-temp:
 value: <4 tanh.1 @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
 value: <5 tanh.2 @0> (size=8192,offset=8192): bf16[32,128]{1,0:T(8,128)(2,1)}
 value: <6 body.1{2} (phi) @0> (size=8192,offset=8192): bf16[32,128]{1,0:T(8,128)(2,1)}
 value: <7 tanh.3 @0> (size=16384,offset=0): f32[32,128]{1,0:T(8,128)}

Total bytes used: 33000 (32.2KiB)
"""
_RANGES = """\
HloLiveRange (max 5):
  InstructionSequence:
    0:x
    1:tanh.1
    2:tanh.2
    3:body.1
    4:tanh.3
  BufferLiveRange:
    x{}:0-5
    fusion.1{1}:1-2
    tanh.1{}:1-3
    tanh.2{}:2-3
    body.1{2}:3-3
    tanh.3{}:4-4
    copy.3{}:4-5
  Live ranges at 2 (peak):
    tanh.2{}: 99999 bytes (cumulative: 99999 bytes)
"""
_PROGRAM = """\
ENTRY %main (x: f32[2,64]) -> f32[8,128] {
  %x = f32[2,64]{1,0} parameter(0), metadata={op_name="batch[\\'image\\']"}
  %tanh.1 = f32[8,128]{1,0} tanh(%x), metadata={op_name="jit(f)/first"}
  ROOT %tanh.3 = f32[32,128]{1,0} tanh(%tanh.1), metadata={op_name="jit(f)/third"}
}
"""


def written(folder: pathlib.Path, allocations: str = _ALLOCATIONS, ranges: str = _RANGES) -> Assignment:
    (folder / "module_0001.jit_f.after_optimizations-buffer-assignment.txt").write_text(allocations)
    (folder / "module_0001.jit_f.after_optimizations-live-range.txt").write_text(ranges)
    return read_assignment(folder)


def test_what_hbm_contains_at_the_peak(tmp_path: pathlib.Path) -> None:
    peak = find_peak(written(tmp_path), parse_program(_PROGRAM), _PROGRAM)
    third = LiveArray("third", "", Array("f32", (32, 128)), 16384)
    image = LiveArray("batch/image", "", Array("f32", (2, 64)), 4096)  # 512 bytes in tiles of 8 x 128
    assert peak == Peak(4096, 16384, 20480, 8192, "third", "", 2, (third, image))
    assert peak.total == 20480 and Peak.from_json(peak.to_json()) == peak
    # Without the third, the first two are live at once, and the loop uses the memory of the second.
    fewer = _ALLOCATIONS.replace(" value: <7 tanh.3 @0> (size=16384", " value: <7 tanh.3 @0> (size=64")
    peak = find_peak(written(tmp_path, fewer), parse_program(_PROGRAM), _PROGRAM)
    assert (peak.temporaries, peak.at, peak.count) == (4096 + 8192, "tanh.2", 3)


def test_dumps_that_are_missing_or_of_two_programs_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"the compiler wrote 0 files \*-buffer-assignment\.txt for one program"):
        read_assignment(tmp_path)
    written(tmp_path)
    (tmp_path / "module_0002.jit_g.after_optimizations-live-range.txt").write_text(_RANGES)
    with pytest.raises(ValueError, match=r"the compiler wrote 2 files \*-live-range\.txt for one program"):
        read_assignment(tmp_path)


@pytest.mark.parametrize(
    ("allocations", "ranges"),
    [
        ("", _RANGES),
        (_ALLOCATIONS.replace("tanh.1 @0", "tanh.1 at 0"), _RANGES),
        (_ALLOCATIONS, ""),
        (_ALLOCATIONS, _RANGES.replace("body.1{2}:", "body.2{2}:")),
    ],
)
def test_another_format_is_refused(tmp_path: pathlib.Path, allocations: str, ranges: str) -> None:
    with pytest.raises(ValueError, match="dump of buffers has another format than that of jax 0"):
        written(tmp_path, allocations, ranges)


_buffers = st.lists(st.tuples(*(st.integers(0, 40) for _ in range(4))), min_size=1, max_size=12)


@given(st.lists(_buffers, min_size=1, max_size=3))
def test_the_peak_equals_that_of_a_map_of_bytes(allocations: list[list[tuple[int, int, int, int]]]) -> None:
    """The oracle marks every byte of every allocation at every position."""
    found, ranges = [], {}
    used = np.zeros((len(allocations), 82, 82), bool)  # allocation, position, byte
    for i, buffers in enumerate(allocations):
        allocation = Allocation(82, 0, "preallocated-temp")
        for j, (offset, size, start, length) in enumerate(buffers):
            result = Result(f"i{i}.{j}", (j,))
            allocation.buffers.append(Buffer(result, offset, size + 1, "f32[1]{0}"))
            ranges[result] = start, start + length
            used[i, start : start + length + 1, offset : offset + size + 1] = True
        found.append(allocation)
    peak = find_peak(Assignment(found, ranges, ["x"] * 82), parse_program(_PROGRAM), _PROGRAM)
    assert peak.temporaries == used.sum(axis=(0, 2)).max() and peak.inputs == 0


def test_a_compiled_function(tmp_path: pathlib.Path) -> None:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        with jax.named_scope("tower"):
            x, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, w)
        return jnp.sum(x**2)

    w, x = jnp.zeros((6, 128, 128)), jnp.zeros((512, 128))
    compiled = jax.jit(jax.grad(loss)).lower(w, x).compile(dump_options(tmp_path))
    text, stats = compiled.as_text(), compiled.memory_analysis()
    peak = find_peak(read_assignment(tmp_path), parse_program(text), text)
    # Constants are no arguments. The compiler reserves at least what is live.
    assert 0 <= peak.inputs - stats.argument_size_in_bytes - stats.output_size_in_bytes < 1024
    assert 6 * 512 * 128 * 4 < peak.temporaries <= peak.allocated == stats.temp_size_in_bytes
    assert peak.on_chip == 0
    by_name = {each.name: each for each in peak.arrays}
    assert by_name["x"].array == Array("f32", (512, 128)) and by_name["x"].bytes == 512 * 128 * 4
    largest = peak.arrays[0]
    assert "jvp(tower)/while/body" in largest.name and largest.array.dims[:2] == (6, 512)
    assert largest.bytes == 6 * 512 * 128 * 4


_ON_TPU = """
import json, tempfile
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from tclip_jax.planning.hlo import parse_program
from tclip_jax.planning.liveness import dump_options, find_peak, read_assignment

def loss(w, x):
    return jnp.sum(jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, w)[0] ** 2)

place = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0])
shapes = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in ((6, 1000, 1000), (16384, 1000))]
with tempfile.TemporaryDirectory() as folder:
    compiled = jax.jit(jax.grad(loss)).lower(*shapes).compile(dump_options(folder))
    text = compiled.as_text()
    peak = find_peak(read_assignment(folder), parse_program(text), text)
print(json.dumps([compiled.memory_analysis().peak_memory_in_bytes, peak.to_json()]))
"""


@pytest.mark.tpu_compile
def test_the_peak_is_that_of_the_compiler_for_tpus() -> None:
    environment = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    process = subprocess.run([sys.executable, "-c", _ON_TPU], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    stated, peak = json.loads(process.stdout.splitlines()[-1])
    assert peak["temporaries"] > peak["on_chip"] > 0
    assert peak["total"] == pytest.approx(stated, rel=1e-5)
    assert peak["arrays"][0]["array"]["dims"] == [6, 16384, 1000] and "tanh" in peak["arrays"][0]["name"]
