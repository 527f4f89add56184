"""What one run of a compiled program does on one device: products, kernels, exchanges, cycles."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from fluxvit_jax.compiler.bundles import Count
from fluxvit_jax.compiler.collectives import KINDS, Collective, Finder
from fluxvit_jax.compiler.hlo import Instruction, Module, called_parts, executed
from fluxvit_jax.compiler.products import OPCODES, Shape, product_flops

ATTENTION = "attention"  # the scope (`jax.named_scope`) that attention's products are in
TEACHER = "teacher"  # likewise that of all that a teacher does
KERNEL = "tpu_custom_call"  # what Pallas kernels are in a TPU program
UNTIMED = 64 * 1024  # bytes of a result from which an instruction without estimate is listed
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "iota", "opt-barrier",
}  # fmt: skip


class Work(NamedTuple):
    """Counts of one device.

    flops: of products outside of kernels; attention_flops: those of them in attention's scope.
    cycles: of the instructions for which the compiler estimates them.
    kernel_cycles: of Pallas kernels, and of others that it writes in place of an estimate;
    kernels: {what it is: how often it runs}, the former only.
    teacher_cycles: those of both that are in a teacher's scope.
    unknown_kernels: runs of kernels whose cycles are not known, or not all of them.
    untimed: {opcode: how often} of other instructions of which that is so.
    unknown_loops: loops whose trips are not to be seen: they count as one trip.
    """

    flops: int
    attention_flops: int
    cycles: int
    kernel_cycles: int
    teacher_cycles: int
    kernels: dict[str, int]
    unknown_kernels: int
    untimed: dict[str, int]
    unknown_loops: int
    collectives: tuple[Collective, ...]


def work_of(
    module: Module, devices: int, kernel_cycles: Mapping[str, Count] = MappingProxyType({})
) -> Work:
    """Counts a program for so many devices.

    kernel_cycles: {name: of one run} of instructions for which the program has no estimate.
    """
    flops = attention = cycles = in_kernels = in_teacher = unknown = loops = 0
    kernels, untimed, exchanges = {}, {}, []
    shapes = _Shapes(module)
    finder = Finder(module, devices, _Costs(module, kernel_cycles))
    for step in executed(module):
        one, times = step.instruction, step.times
        if one.opcode in OPCODES:
            own = times * product_flops(one, shapes.of_operands(one, step.computation))
            flops += own
            attention += own if in_scope(one.op_name, ATTENTION) else 0
        if (exchange := finder.begun_by(step)) is not None:
            exchanges.append(exchange)
        if step.fused:
            continue
        loops += one.opcode == "while" and not called_parts(module, step.computation, one).known
        before = cycles + in_kernels
        if one.cycles is not None:
            cycles += times * one.cycles
        elif is_kernel(one) or takes_time(one):
            count = kernel_cycles.get(one.name, Count(0, whole=False))
            in_kernels += times * count.cycles
            if is_kernel(one):
                kernel = kernel_name(one)
                kernels[kernel] = kernels.get(kernel, 0) + times
                unknown += times * (not count.whole)
            elif not count.whole:
                untimed[one.opcode] = untimed.get(one.opcode, 0) + times
        if in_scope(one.op_name, TEACHER):
            in_teacher += cycles + in_kernels - before
    return Work(
        flops=flops,
        attention_flops=attention,
        cycles=cycles,
        kernel_cycles=in_kernels,
        teacher_cycles=in_teacher,
        kernels=kernels,
        unknown_kernels=unknown,
        untimed=untimed,
        unknown_loops=loops,
        collectives=tuple(exchanges),
    )


def is_kernel(one: Instruction) -> bool:
    """Whether an instruction is a Pallas kernel on TPU."""
    return one.opcode == "custom-call" and f'custom_call_target="{KERNEL}"' in one.attributes


def kernel_name(one: Instruction) -> str:
    """The name that the kernel's author gave it: what calls of it share."""
    return re.sub(r"\.\d+$", "", one.name)


def in_scope(op_name: str, scope: str) -> bool:
    """Whether a scope is among those of an instruction, under transformations or not."""
    return re.search(rf"(?<!\w){scope}(?!\w)", op_name) is not None


def takes_time(one: Instruction) -> bool:
    """Whether an instruction for which the compiler makes no estimate moves or makes much."""
    if one.opcode in (*_FREE, *KINDS) or one.opcode.endswith(("-start", "-done", "-update")):
        return False
    if one.attribute(r'custom_call_target="(\w*Bitcast|AllocateBuffer)"'):
        return False
    if one.opcode == "fusion" and "async-collective" in one.name:
        return False  # begins or ends an exchange
    return sum(array.bytes for array in one.arrays) >= UNTIMED


class _Costs:
    """Cycles of an instruction, with the trips of a loop and what they take."""

    def __init__(self, module: Module, kernel_cycles: Mapping[str, Count]):
        self._module = module
        self._kernel_cycles = kernel_cycles
        self._known: dict[str, int] = {}

    def __call__(self, one: Instruction, computation: str) -> int:
        if one.cycles is not None:
            return one.cycles
        if one.opcode == "fusion":
            return 0
        parts = called_parts(self._module, computation, one)
        inside = sum(map(self._of_computation, parts.names))
        kernel = self._kernel_cycles.get(one.name)
        return (kernel.cycles if kernel else 0) + parts.trips * inside

    def _of_computation(self, name: str) -> int:
        if name not in self._known:
            self._known[name] = sum(self(one, name) for one in self._module.computations[name])
        return self._known[name]


class _Shapes:
    """Sides of the operands of instructions."""

    def __init__(self, module: Module):
        self._module = module
        self._known: dict[str, dict[str, Instruction]] = {}

    def of_operands(self, one: Instruction, computation: str) -> list[Shape]:
        if computation not in self._known:
            self._known[computation] = self._module.instructions(computation)
        known = self._known[computation]
        found = [known[name].arrays for name in one.operands if name in known]
        return [arrays[0].shape for arrays in found if arrays]
