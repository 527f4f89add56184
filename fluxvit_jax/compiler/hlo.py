"""Reading a compiled program: its text (`compiled.as_text()`) as computations and instructions.

The text of two compiles of one program differs, in names, numbers and order; what is counted of it
does not.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-<>]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-<>]+) = (.*)$", re.DOTALL)
_NAME = re.compile(r"%([\w.\-<>]+)")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=\s]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
CALLED = re.compile(r"\b(?:calls|to_apply)=%([\w.\-<>]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.\-<>]+)")


class Array(NamedTuple):
    """Type and sides of an array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BITS.get(self.dtype, 8) // 8


class Instruction(NamedTuple):
    """name: of the result; result: text of its type; operands: names; attributes: all behind."""

    name: str
    root: bool
    result: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    @property
    def arrays(self) -> list[Array]:
        """The result's arrays, those of a tuple one after another."""
        return arrays(self.result)

    @property
    def cycles(self) -> int | None:
        """The TPU compiler's estimate of one execution, where it makes one."""
        match = _CYCLES.search(self.attributes)
        return int(match[1]) if match else None

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from: names of scopes and the primitive."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def attribute(self, pattern: str) -> str | None:
        """The first group of `pattern` in the attributes."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None


class Module(NamedTuple):
    """computations: {name: its instructions, in the order in which they run}."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    def instructions(self, computation: str) -> dict[str, Instruction]:
        return {one.name: one for one in self.computations[computation]}


class Executed(NamedTuple):
    """An instruction and how often a run of the program executes it.

    fused: it is part of a fusion, which has its own estimate of cycles.
    """

    instruction: Instruction
    computation: str
    times: int
    fused: bool


class Parts(NamedTuple):
    """Computations that an instruction runs, and how often.

    Of a `conditional` they are all branches. known: False for a loop whose trips are not to be
    seen; they are 1 then.
    """

    names: tuple[str, ...] = ()
    trips: int = 1
    known: bool = True


def parse(text: str) -> Module:
    """Raises ValueError if `text` is no compiled program."""
    computations, entry, body, name = {}, None, [], None
    for line in text.splitlines():
        if name is None:
            if match := _HEAD.match(line):
                name, body = match[2], []
                entry = name if match[1] else entry
        elif line == "}":
            computations[name] = tuple(filter(None, map(_instruction, body)))
            name = None
        elif _INSTRUCTION.match(line):
            body.append(line)
        elif body:
            body[-1] += line  # texts within attributes may hold line breaks
    if entry is None:
        raise ValueError("no compiled program: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    result, rest = _split_result(match[3])
    opcode, opened, behind = rest.partition("(")
    if not opened:
        return None
    arguments, attributes = _split_closing(behind)
    operands = tuple(_NAME.findall(arguments))
    return Instruction(
        match[2], bool(match[1]), result, opcode.strip(), operands, arguments, attributes
    )


def _split_result(text: str) -> tuple[str, str]:
    """The type before an instruction's opcode, and the rest: types of tuples are in brackets."""
    if not text.startswith("("):
        result, _, rest = text.partition(" ")
        return result, rest
    result, rest = _split_closing(text[1:])
    return result, rest.lstrip()


def _split_closing(text: str) -> tuple[str, str]:
    """What is before the bracket that closes one opened before `text`, and what is behind it."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return text[: match.start()], text[match.end() :]
    return text, ""


def arrays(result: str) -> list[Array]:
    """Arrays of the text of a type: "(f32[2,3]{1,0}, s32[])" has two."""
    return [
        Array(dtype, tuple(int(re.sub(r"\D", "", side)) for side in shape.split(",") if side))
        for dtype, shape in _ARRAY.findall(result)
        if dtype in BITS or dtype.startswith("f8")
    ]


def executed(module: Module) -> Iterator[Executed]:
    """All instructions that a run executes, those of fusions among them."""
    yield from _executed(module, module.entry, 1, False)


def _executed(module: Module, computation: str, times: int, fused: bool) -> Iterator[Executed]:
    for one in module.computations[computation]:
        yield Executed(one, computation, times, fused)
        parts = called_parts(module, computation, one)
        for name in parts.names:
            inside = fused or one.opcode == "fusion"
            yield from _executed(module, name, times * parts.trips, inside)


def called_parts(module: Module, computation: str, one: Instruction) -> Parts:
    """What an instruction of `computation` runs. Reductions' scalar functions are left out."""
    if one.opcode == "while":
        names = [one.attribute(rf"\b{part}=%([\w.\-<>]+)") for part in ("condition", "body")]
        trips = loop_trips(module, computation, one)
        return Parts(tuple(names), 1 if trips is None else trips, trips is not None)
    if one.opcode == "conditional":
        branches = ("".join(found) for found in _BRANCHES.findall(one.attributes))
        return Parts(tuple(name for text in branches for name in _NAME.findall(text)))
    if one.opcode.removesuffix("-start") in ("call", "fusion", "async"):
        called = CALLED.search(one.attributes)
        if called and called[1] in module.computations:
            return Parts((called[1],))
    return Parts()


def loop_trips(module: Module, computation: str, loop: Instruction) -> int | None:
    """Trips of a `while`: as the compiler notes, or by the constants it counts from, by and to.

    None where no constant bounds the loop.
    """
    if noted := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(noted)
    found = _bound(module, loop)
    if found is None:
        return None
    index, bound = found
    start = _start(module, computation, loop, index)
    return max(-(-(bound - start) // _step(module, loop, index)), 0)


def _bound(module: Module, loop: Instruction) -> tuple[int, int] | None:
    """Which part of a loop's state counts, and the number that it stays below."""
    condition = module.instructions(loop.attribute(r"\bcondition=%([\w.\-<>]+)"))
    comparison = next(one for one in condition.values() if one.root)
    sides = comparison.operands
    if comparison.opcode == "fusion":  # of the comparison alone, with parameters as its operands
        inside = module.instructions(CALLED.search(comparison.attributes)[1])
        comparison = next(one for one in inside.values() if one.root)
        places = [_whole(inside[name].arguments) for name in comparison.operands]
        sides = [sides[place] for place in places if place is not None]
    if comparison.opcode != "compare" or len(sides) != 2:
        return None
    direction = comparison.attribute(r"direction=(\w+)")
    if direction in ("GT", "GE"):
        sides, direction = sides[::-1], {"GT": "LT", "GE": "LE"}[direction]
    counter, bound = condition.get(sides[0]), _constant(condition, sides[1])
    index = _index(counter)
    if index is None or bound is None or direction not in ("LT", "LE"):
        return None
    return index, bound + (direction == "LE")


def _index(one: Instruction | None) -> int | None:
    """Which part of a tuple an instruction takes, if it does."""
    if one is None or one.opcode != "get-tuple-element":
        return None
    return int(one.attribute(r"\bindex=(\d+)"))


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _original(instructions: dict[str, Instruction], name: str) -> Instruction | None:
    """What a value is a copy of."""
    one = instructions.get(name)
    while one is not None and one.opcode in ("copy", "bitcast", "convert", "reshape"):
        one = instructions.get(one.operands[0])
    return one


def _constant(instructions: dict[str, Instruction], name: str) -> int | None:
    """The integer that a value is, None if it is no constant one."""
    one = _original(instructions, name)
    return _whole(one.arguments) if one is not None and one.opcode == "constant" else None


def _start(module: Module, computation: str, loop: Instruction, index: int) -> int:
    """What a loop's counter starts at; 0, as is usual, where that cannot be seen."""
    outside = module.instructions(computation)
    state = outside.get(loop.operands[0])
    if state is None or state.opcode != "tuple":
        return 0
    return _constant(outside, state.operands[index]) or 0


def _step(module: Module, loop: Instruction, index: int) -> int:
    """What a trip adds to a loop's counter; 1, as is usual, where that cannot be seen."""
    body = module.instructions(loop.attribute(r"\bbody=%([\w.\-<>]+)"))
    root = next(one for one in body.values() if one.root)
    one, step = _original(body, root.operands[index]) if root.opcode == "tuple" else None, 0
    while one is not None and one.opcode == "add":
        constants = [_constant(body, name) for name in one.operands]
        if constants.count(None) != 1:
            return 1
        step += constants[constants[0] is None]
        one = _original(body, one.operands[constants[0] is not None])
    return step if step > 0 and _index(one) == index else 1
