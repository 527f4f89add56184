"""Work of one run of a compiled program on one device: products, kernels, exchanges, cycles."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fluxvit_jax.preflight.compiler.bundles import Count
from fluxvit_jax.preflight.compiler.collectives import KINDS, Collective, Finder
from fluxvit_jax.preflight.compiler.hlo import Instruction, Module, called_parts, executed
from fluxvit_jax.preflight.compiler.products import OPCODES, Shape, product_flops

ATTENTION = "attention"  # the scope (`jax.named_scope`) that attention's products are in
FROZEN = "frozen"  # the scope of networks that are run without a backward pass
KERNEL = "tpu_custom_call"  # target of Pallas kernels in a TPU program
UNTIMED = 64 * 1024  # bytes of a result from which an instruction without estimate is listed
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "iota", "opt-barrier",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Counts of one device.

    flops: of products outside of kernels; attention_flops: those of them in attention's scope.
    cycles: of the instructions with an estimate of the compiler's.
    kernel_cycles: of Pallas kernels, and of other instructions whose bundles it writes instead.
    kernels: {name: runs} of Pallas kernels only.
    frozen_cycles: those of both that are in the scope of frozen networks.
    unknown_kernels: runs of kernels whose cycles are not or not completely known.
    untimed: {opcode: count} of other instructions without a complete estimate.
    unknown_loops: loops with an unknown trip count; they count as one trip.
    """

    flops: int
    attention_flops: int
    cycles: int
    kernel_cycles: int
    frozen_cycles: int
    kernels: dict[str, int]
    unknown_kernels: int
    untimed: dict[str, int]
    unknown_loops: int
    collectives: tuple[Collective, ...]


def work_of(
    module: Module, devices: int, kernel_cycles: Mapping[str, Count] = MappingProxyType({})
) -> Work:
    """Counts the work of a program for `devices` devices.

    kernel_cycles: {name: of one run} of instructions without an estimate in the program.
    """
    flops = attention = cycles = in_kernels = in_frozen = unknown = loops = 0
    kernels: dict[str, int] = {}
    untimed: dict[str, int] = {}
    exchanges = []
    shapes = _Shapes(module)
    finder = Finder(module, devices, _Costs(module, kernel_cycles))
    for step in executed(module):
        instruction, times = step.instruction, step.times
        if instruction.opcode in OPCODES:
            operands = shapes.of_operands(instruction, step.computation)
            step_flops = times * product_flops(instruction, operands)
            flops += step_flops
            attention += step_flops if in_scope(instruction.op_name, ATTENTION) else 0
        if (exchange := finder.begun_by(step)) is not None:
            exchanges.append(exchange)
        if step.fused:
            continue
        if instruction.opcode == "while":
            loops += not called_parts(module, step.computation, instruction).known
        before = cycles + in_kernels
        if instruction.cycles is not None:
            cycles += times * instruction.cycles
        elif is_kernel(instruction) or takes_time(instruction):
            count = kernel_cycles.get(instruction.name, Count(0, complete=False))
            in_kernels += times * count.cycles
            if is_kernel(instruction):
                kernel = kernel_name(instruction)
                kernels[kernel] = kernels.get(kernel, 0) + times
                unknown += times * (not count.complete)
            elif not count.complete:
                untimed[instruction.opcode] = untimed.get(instruction.opcode, 0) + times
        if in_scope(instruction.op_name, FROZEN):
            in_frozen += cycles + in_kernels - before
    return Work(
        flops=flops,
        attention_flops=attention,
        cycles=cycles,
        kernel_cycles=in_kernels,
        frozen_cycles=in_frozen,
        kernels=kernels,
        unknown_kernels=unknown,
        untimed=untimed,
        unknown_loops=loops,
        collectives=tuple(exchanges),
    )


def is_kernel(instruction: Instruction) -> bool:
    """Whether an instruction is a Pallas kernel on TPU."""
    target = f'custom_call_target="{KERNEL}"'
    return instruction.opcode == "custom-call" and target in instruction.attributes


def kernel_name(instruction: Instruction) -> str:
    """The name that the kernel's author gave it, which all its calls share."""
    return re.sub(r"\.\d+$", "", instruction.name)


def in_scope(op_name: str, scope: str) -> bool:
    """Whether a scope is among those of an instruction, under transformations or not."""
    return re.search(rf"(?<!\w){scope}(?!\w)", op_name) is not None


def takes_time(instruction: Instruction) -> bool:
    """Whether an instruction without a compiler estimate moves or makes much data."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode in KINDS or opcode.endswith(("-start", "-done", "-update")):
        return False
    if instruction.attribute(r'custom_call_target="(\w*Bitcast|AllocateBuffer)"'):
        return False
    if opcode == "fusion" and "async-collective" in instruction.name:
        return False  # begins or ends an exchange
    return sum(array.bytes for array in instruction.arrays) >= UNTIMED


class _Costs:
    """Cycles of an instruction, those of a loop's trips included."""

    def __init__(self, module: Module, kernel_cycles: Mapping[str, Count]):
        self._module = module
        self._kernel_cycles = kernel_cycles
        self._known: dict[str, int] = {}

    def __call__(self, instruction: Instruction, computation: str) -> int:
        if instruction.cycles is not None:
            return instruction.cycles
        if instruction.opcode == "fusion":
            return 0
        parts = called_parts(self._module, computation, instruction)
        inside = sum(map(self._of_computation, parts.names))
        kernel = self._kernel_cycles.get(instruction.name)
        return (kernel.cycles if kernel else 0) + parts.trips * inside

    def _of_computation(self, name: str) -> int:
        if name not in self._known:
            self._known[name] = sum(self(one, name) for one in self._module.computations[name])
        return self._known[name]


class _Shapes:
    """Shapes of the operands of instructions."""

    def __init__(self, module: Module):
        self._module = module
        self._known: dict[str, dict[str, Instruction]] = {}

    def of_operands(self, instruction: Instruction, computation: str) -> list[Shape]:
        if computation not in self._known:
            self._known[computation] = self._module.instructions(computation)
        known = self._known[computation]
        operands = [known[name].arrays for name in instruction.operands if name in known]
        return [arrays[0].shape for arrays in operands if arrays]
