"""Exchanges between devices in a compiled program: kind, bytes, group, and work that hides them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fluxvit_jax.preflight.compiler.hlo import CALLED, Executed, Instruction, Module

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

Cost = Callable[[Instruction, str], int]  # cycles of an instruction in a computation


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """An exchange.

    bytes: of the whole array, so of an all-gather's result and of a reduce-scatter's operand.
    group: numbers of the devices of the first group, in the order of the mesh; of a permutation
        the first device and its destination.
    times: executions per run.
    covered: cycles of the work between its start and its end.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    times: int
    covered: int


class Finder:
    """Finds the exchanges of one program for `devices` devices."""

    def __init__(self, module: Module, devices: int, cost: Cost):
        self._module = module
        self._devices = devices
        self._cost = cost
        self._covered = {
            name: covered
            for computation in module.computations
            for name, covered in self._covered_in(computation).items()
        }

    def begun_by(self, step: Executed) -> Collective | None:
        """The exchange that an instruction begins, None if it begins none.

        An exchange in two instructions begins with the `-start`. The TPU compiler also has fusions
        that begin, continue and end one; each holds the collective, and the first of them counts.
        """
        instruction = step.instruction
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            return None
        covered = self._covered.get(instruction.name, 0)
        if step.fused:
            fusion = self._module.computations[step.computation]
            role = _role(step.computation, fusion)
            if role == "continue":
                return None
            covered = self._covered.get(step.computation, 0) if role == "start" else 0
            if kind == "all-reduce" and any(one.opcode == "dynamic-slice" for one in fusion):
                kind = "reduce-scatter"  # as the TPU compiler writes it
        group = first_group(instruction, self._devices)
        return Collective(
            kind=kind,
            bytes=_bytes(instruction, len(group)),
            group=group,
            times=step.times,
            covered=covered,
        )

    def _covered_in(self, computation: str) -> dict[str, int]:
        """Cycles between start and end of the exchanges that begin and end in a computation.

        By the name of the `-start`, or of the fused computation that begins.
        """
        covered: dict[str, int] = {}
        pending: dict[str, tuple[str, int]] = {}  # {key that ends it: (name, cycles before)}
        total = 0
        for instruction in self._module.computations[computation]:
            for key in [key for key in pending if self._ends(instruction, key)]:
                name, before = pending.pop(key)
                covered[name] = total - before
            if (begun := self._begins(instruction)) is not None:
                key, name = begun
                pending[key] = name, total
            else:
                total += self._cost(instruction, computation)
        return covered

    def _begins(self, one: Instruction) -> tuple[str, str] | None:
        if one.opcode.endswith("-start") and one.opcode.removesuffix("-start") in KINDS:
            return one.name, one.name
        called = self._fused(one)
        if called and _role(called, self._module.computations[called]) == "start":
            return f"channel {self._channel(called)}", called
        return None

    def _ends(self, one: Instruction, key: str) -> bool:
        if one.opcode.endswith("-done"):
            return key in one.operands
        called = self._fused(one)
        if not called:
            return False
        inside = self._module.computations[called]
        ends = any("AsyncCollectiveDone" in other.attributes for other in inside)
        return ends and key == f"channel {self._channel(called)}"

    def _fused(self, one: Instruction) -> str | None:
        called = CALLED.search(one.attributes) if one.opcode == "fusion" else None
        return called[1] if called and called[1] in self._module.computations else None

    def _channel(self, computation: str) -> str | None:
        for one in self._module.computations[computation]:
            if channel := one.attribute(r"channel_id=(\d+)"):
                return channel
        return None


def _role(name: str, inside: Sequence[Instruction]) -> str:
    """The part of a collective that a fusion performs: "start", "continue" or "all"."""
    if any("AsyncCollectiveStart" in one.attributes for one in inside):
        return "start"
    ends = any("AsyncCollectiveDone" in one.attributes for one in inside)
    return "continue" if ends or name.startswith("async_collective_fusion") else "all"


def _bytes(one: Instruction, group: int) -> int:
    sizes = [array.bytes for array in one.arrays]
    if one.opcode == "collective-permute-start":
        return sizes[0]  # the others are its destination and flags
    if one.opcode == "all-gather-start":
        return max(sizes)  # the other is its operand
    return sum(sizes) * (group if one.opcode.startswith("reduce-scatter") else 1)


def first_group(one: Instruction, devices: int) -> tuple[int, ...]:
    """Numbers of the devices of a collective's first group.

    Written as "{{0,1},{2,3}}"; as an array of groups "[2,4]<=[4,2]T(1,0)"; or as axes of a mesh,
    "mesh['a'=2,'b'=4] {'b'}". All devices, where it is not written.
    """
    if pair := one.attribute(r"source_target_pairs=\{\{(\d+,\d+)"):
        return _numbers(pair)
    text = one.attribute(r"replica_groups=(.*)") or ""
    if match := re.match(r"\{\{([\d,]+)\}", text):
        return _numbers(match[1])
    if match := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        order = np.arange(devices).reshape(_numbers(match[2]))
        order = order.transpose(_numbers(match[3])) if match[3] else order
        return tuple(order.reshape(_numbers(match[1]))[0].tolist())
    if match := re.match(r"mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sides = dict(re.findall(r"'([^']*)'=(\d+)", match[1]))
        exchanging = re.findall(r"'([^']*)'", match[2])
        order = np.arange(devices).reshape([int(side) for side in sides.values()])
        first = tuple(slice(None) if name in exchanging else 0 for name in sides)
        return tuple(order[first].ravel().tolist())
    return tuple(range(devices))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))
