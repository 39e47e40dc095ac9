"""Bytes that a compiled program moves to and from the main memory of a device in a step.

Each instruction reads its operands and writes its results, but for those that the compiler keeps on the chip. A slice
reads what it takes and an update in place writes what it changes, also where they are fused. Padding of tiles is not
counted, nor that an operand may be read more than once.
"""

from __future__ import annotations

from collections.abc import Iterable

from tclip_jax.planning.hlo import Array, Computation, Instruction, Program, called, executions

# They name what is there already, or wait for what another instruction started.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "conditional", "call", "iota", "optimization-barrier"),
}
_SLICES = {"dynamic-slice", "slice", "gather"}
_UPDATE = "dynamic-update-slice"


def memory_traffic(program: Program) -> int:
    """Bytes read and written a step on each device."""
    return sum(
        times * _moved(program, each, program.computations[name])
        for name, times in executions(program)
        for each in program.computations[name].values()
    )


def _moved(program: Program, each: Instruction, computation: Computation) -> int:
    if each.opcode in _FREE or each.opcode.endswith("-done"):
        return 0
    operands = [computation[name].arrays for name in each.operands if name in computation]
    if each.opcode == "copy-start":  # (to, from, context)
        return _bytes(each.arrays[:2])
    if each.opcode == "slice-start":  # ((from), to, context)
        return each.arrays[1].bytes + _bytes(each.arrays[1:2])
    if each.opcode in _SLICES:
        return _bytes(each.arrays) + _part(operands[0], each.arrays)
    if each.opcode == _UPDATE:
        return _bytes(operands[1]) + _part(each.arrays, operands[1])
    if each.opcode == "fusion":
        fused = program.computations[called(each)[0]]
        read = sum(_read(program, fused, i, arrays) for i, arrays in enumerate(operands))
        return read + _written(program, fused, each.arrays)
    return sum(map(_bytes, operands)) + _bytes(each.arrays)


def _read(program: Program, fused: Computation, index: int, arrays: tuple[Array, ...]) -> int:
    """Of an operand of a fusion: all of it, or the slices that are taken."""
    whole = _bytes(arrays)
    if not whole:
        return 0
    parameter = next(e for e in fused.values() if e.opcode == "parameter" and e.attributes.startswith(f"({index})"))
    names, parts = [parameter.name], 0
    while names:
        name = names.pop()
        for user in fused.values():
            if name not in user.operands:
                continue
            if user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode == "fusion":
                inner = program.computations[called(user)[0]]
                parts += _read(program, inner, user.operands.index(name), arrays)
            elif user.opcode in _SLICES and user.operands[0] == name:
                parts += sum(array.bytes for array in user.arrays)
            elif not (user.opcode == "tuple" or (user.opcode == _UPDATE and user.operands[0] == name)):
                return whole
    return min(parts, whole)


def _written(program: Program, fused: Computation, arrays: tuple[Array, ...]) -> int:
    """Of the results of a fusion: all of them, or what is changed in them."""
    root = next(each for each in fused.values() if each.is_root)
    results = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    written = 0
    for result, array in zip(results, arrays, strict=False):
        while result.opcode == "bitcast" and result.operands[0] in fused:
            result = fused[result.operands[0]]
        if array.on_chip or result.opcode == "parameter":
            continue
        if result.opcode == "fusion":
            written += _written(program, program.computations[called(result)[0]], (array,))
        elif result.opcode == _UPDATE:
            written += sum(each.bytes for each in fused[result.operands[1]].arrays)
        else:
            written += array.bytes
    return written


def _bytes(arrays: Iterable[Array]) -> int:
    return sum(array.bytes for array in arrays if not array.on_chip)


def _part(whole: tuple[Array, ...], part: tuple[Array, ...]) -> int:
    """Bytes of a part of an array, if that is in the main memory."""
    return 0 if whole[0].on_chip else sum(array.bytes for array in part)
