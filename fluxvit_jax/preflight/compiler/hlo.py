"""Parser of the text of a compiled program (`compiled.as_text()`).

The texts of two compiles of one program differ in names, numbers and order, but not in the counts
that are made from them.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

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
_LOOP_PARTS = ("condition", "body")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.\-<>]+)")


@dataclass(frozen=True, slots=True)
class Array:
    """Type and shape of an array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BITS.get(self.dtype, 8) // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """name: of the result; result: text of its type; operands: names in `arguments`, the text in
    parentheses; attributes: the text after it.
    """

    name: str
    root: bool
    result: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    @property
    def arrays(self) -> list[Array]:
        """The result's arrays; "(f32[2,3]{1,0}, s32[])" has two."""
        return [
            Array(dtype, tuple(int(re.sub(r"\D", "", side)) for side in shape.split(",") if side))
            for dtype, shape in _ARRAY.findall(self.result)
            if dtype in BITS or dtype.startswith("f8")
        ]

    @property
    def cycles(self) -> int | None:
        """The TPU compiler's estimate of one execution, where it makes one."""
        match = _CYCLES.search(self.attributes)
        return int(match[1]) if match else None

    @property
    def op_name(self) -> str:
        """Its origin in the traced program: names of scopes and the primitive."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    def attribute(self, pattern: str) -> str | None:
        """The first group of `pattern` in the attributes, None where it does not match."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None


@dataclass(frozen=True, slots=True)
class Module:
    """computations: {name: its instructions, in the order in which they run}."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    def instructions(self, computation: str | None) -> dict[str, Instruction]:
        """By name; none where `computation` is None."""
        listed = self.computations[computation] if computation is not None else ()
        return {instruction.name: instruction for instruction in listed}


@dataclass(frozen=True, slots=True)
class Executed:
    """An instruction and how often a run of the program executes it.

    fused: whether it is part of a fusion, which has its own estimate of cycles.
    """

    instruction: Instruction
    computation: str
    times: int
    fused: bool


@dataclass(frozen=True, slots=True)
class Parts:
    """Computations that an instruction calls, and how often.

    A `conditional` calls all its branches. known: False for a loop with an unknown trip count,
    which counts as 1.
    """

    names: tuple[str, ...] = ()
    trips: int = 1
    known: bool = True


def parse(text: str) -> Module:
    """Raises ValueError if `text` is not a compiled program."""
    computations: dict[str, tuple[Instruction, ...]] = {}
    body: list[str] = []
    entry = name = None
    for line in text.splitlines():
        if name is None:
            if match := _HEAD.match(line):
                name, body = match[2], []
                entry = name if match[1] else entry
        elif line == "}":
            parsed = (_instruction(text) for text in body)
            computations[name] = tuple(one for one in parsed if one is not None)
            name = None
        elif _INSTRUCTION.match(line):
            body.append(line)
        elif body:
            body[-1] += line  # strings in attributes may contain line breaks
    if entry is None:
        raise ValueError("no compiled program: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    assert match is not None  # `parse` has checked
    result, rest = _split_result(match[3])
    opcode, parenthesis, rest = rest.partition("(")
    if not parenthesis:
        return None
    arguments, attributes = _split_closing(rest)
    return Instruction(
        name=match[2],
        root=bool(match[1]),
        result=result,
        opcode=opcode.strip(),
        operands=tuple(_NAME.findall(arguments)),
        arguments=arguments,
        attributes=attributes,
    )


def _split_result(text: str) -> tuple[str, str]:
    """The type before an instruction's opcode, and the rest; types of tuples are in parentheses."""
    if not text.startswith("("):
        result, _, rest = text.partition(" ")
        return result, rest
    result, rest = _split_closing(text[1:])
    return result, rest.lstrip()


def _split_closing(text: str) -> tuple[str, str]:
    """The text up to the parenthesis that closes one opened before `text`, and the rest."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return text[: match.start()], text[match.end() :]
    return text, ""


def executed(module: Module) -> Iterator[Executed]:
    """All instructions that a run executes, including those of fusions."""
    return _executed(module, module.entry, 1, False)


def _executed(module: Module, computation: str, times: int, fused: bool) -> Iterator[Executed]:
    for instruction in module.computations[computation]:
        yield Executed(instruction, computation, times, fused)
        parts = called_parts(module, computation, instruction)
        inside = fused or instruction.opcode == "fusion"
        for name in parts.names:
            yield from _executed(module, name, times * parts.trips, inside)


def called_parts(module: Module, computation: str, instruction: Instruction) -> Parts:
    """Parts that an instruction of `computation` calls, without reductions' scalar functions."""
    if instruction.opcode == "while":
        names = [instruction.attribute(rf"\b{part}=%([\w.\-<>]+)") for part in _LOOP_PARTS]
        trips = loop_trips(module, computation, instruction)
        called = tuple(name for name in names if name is not None)
        return Parts(called, 1 if trips is None else trips, trips is not None)
    if instruction.opcode == "conditional":
        branches = ("".join(groups) for groups in _BRANCHES.findall(instruction.attributes))
        return Parts(tuple(name for text in branches for name in _NAME.findall(text)))
    if instruction.opcode.removesuffix("-start") in ("call", "fusion", "async"):
        match = CALLED.search(instruction.attributes)
        if match and match[1] in module.computations:
            return Parts((match[1],))
    return Parts()


def loop_trips(module: Module, computation: str, loop: Instruction) -> int | None:
    """Trips of a `while`: noted by the compiler, or from the constants of its counter.

    None where no constant bounds the loop.
    """
    if noted := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(noted)
    counter = _counter_and_bound(module, loop)
    if counter is None:
        return None
    index, bound = counter
    start = _start(module, computation, loop, index)
    return max(math.ceil((bound - start) / _step(module, loop, index)), 0)


def _counter_and_bound(module: Module, loop: Instruction) -> tuple[int, int] | None:
    """Index of the counter in a loop's state, and the number that it stays below."""
    condition = module.instructions(loop.attribute(r"\bcondition=%([\w.\-<>]+)"))
    comparison = next(one for one in condition.values() if one.root)
    sides = comparison.operands
    if comparison.opcode == "fusion":  # of the comparison alone, with parameters as its operands
        inside = module.instructions(comparison.attribute(CALLED.pattern))
        comparison = next(one for one in inside.values() if one.root)
        parameters = [_integer(inside[name].arguments) for name in comparison.operands]
        sides = tuple(sides[number] for number in parameters if number is not None)
    if comparison.opcode != "compare" or len(sides) != 2:
        return None
    direction = comparison.attribute(r"direction=(\w+)")
    if direction in ("GT", "GE"):
        sides, direction = sides[::-1], {"GT": "LT", "GE": "LE"}[direction]
    index, bound = _tuple_index(condition.get(sides[0])), _constant(condition, sides[1])
    if index is None or bound is None or direction not in ("LT", "LE"):
        return None
    return index, bound + (direction == "LE")


def _tuple_index(instruction: Instruction | None) -> int | None:
    """Index of the tuple's element that a `get-tuple-element` takes, None for all else."""
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    return _integer(instruction.attribute(r"\bindex=(\d+)") or "")


def _integer(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _original(instructions: dict[str, Instruction], name: str) -> Instruction | None:
    """The instruction that a value is a copy of."""
    original = instructions.get(name)
    while original is not None and original.opcode in ("copy", "bitcast", "convert", "reshape"):
        original = instructions.get(original.operands[0])
    return original


def _constant(instructions: dict[str, Instruction], name: str) -> int | None:
    """The value of an integer constant, None for all else."""
    original = _original(instructions, name)
    if original is None or original.opcode != "constant":
        return None
    return _integer(original.arguments)


def _start(module: Module, computation: str, loop: Instruction, index: int) -> int:
    """Initial value of a loop's counter; 0, the usual one, where it is unknown."""
    outside = module.instructions(computation)
    state = outside.get(loop.operands[0])
    if state is None or state.opcode != "tuple":
        return 0
    return _constant(outside, state.operands[index]) or 0


def _step(module: Module, loop: Instruction, index: int) -> int:
    """Increment of a loop's counter per trip; 1, the usual one, where it is unknown."""
    body = module.instructions(loop.attribute(r"\bbody=%([\w.\-<>]+)"))
    root = next(one for one in body.values() if one.root)
    value = _original(body, root.operands[index]) if root.opcode == "tuple" else None
    step = 0
    while value is not None and value.opcode == "add":
        constants = [_constant(body, name) for name in value.operands]
        numbers = [number for number in constants if number is not None]
        if len(numbers) != 1 or len(constants) != 2:
            return 1
        step += numbers[0]
        value = _original(body, value.operands[constants.index(None)])
    return step if step > 0 and _tuple_index(value) == index else 1
