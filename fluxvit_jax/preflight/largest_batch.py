"""The largest batch that fits, by compiling a few."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fluxvit_jax.compiler.memory import tree_bytes
from fluxvit_jax.compiler.program import Program
from fluxvit_jax.preflight.programs import model_flops
from fluxvit_jax.preflight.target import Target

PROBES = 4  # compiles at most, in search of the largest batch
GROWTH = 8  # of the batch from one to the next, at most

Report = dict[str, Any]


class Tried(NamedTuple):
    """A batch of so many units that was compiled, and the bytes that it needs."""

    units: int
    needed: int
    fits: bool


def search_largest(
    first: Tried, fixed: int, available: int, compile_units: Callable[[int], Tried]
) -> list[Tried]:
    """All that was tried in search of the largest batch that fits; `first` is known already.

    Memory grows about linearly with the batch, so a line through what is known says what to try
    next, at most `GROWTH` times what fits, and compiling says whether it is so. It ends when the
    next larger batch failed, or would not fit by that line.

    fixed: bytes that do not depend on the batch, about.
    """
    tried = [first]
    for _ in range(PROBES):
        largest = max((one.units for one in tried if one.fits), default=0)
        failing = min((one.units for one in tried if not one.fits), default=math.inf)
        guess = min(_fitting_units(tried, fixed, available), failing - 1)
        guess = min(guess, GROWTH * largest) if largest else max(guess, 1)
        if not largest < guess < failing:
            break
        tried.append(compile_units(guess))
    return tried


def _fitting_units(tried: Sequence[Tried], fixed: int, available: int) -> int:
    """How many units fit by the line through the two batches nearest to what is available."""
    known = {0: fixed} | {one.units: one.needed for one in tried}
    near = sorted(known, key=lambda units: abs(known[units] - available))[:2]
    (a, at_a), (b, at_b) = ((units, known[units]) for units in near)
    slope = max((at_b - at_a) / (b - a), 1.0)
    return math.floor(a + (available - at_a) / slope)


def largest_batch(target: Target, training: Program) -> Report:
    config, unit = target.config, target.unit
    programs = {config.train.batch_size // unit: training}

    def compile_units(units: int) -> Tried:
        if units not in programs:
            own = config.copy_and_resolve_references()
            own.train.batch_size = units * unit
            programs[units] = target.compile_training(own)
        program = programs[units]
        # What fails for another reason counts as just too large.
        return Tried(units, _needed(program) or training.available + 1, program.fits)

    state = tree_bytes(target.state)
    first = compile_units(config.train.batch_size // unit)
    tried = search_largest(first, state, training.available, compile_units)
    largest = max((one.units for one in tried if one.fits), default=0)
    failing = min((one.units for one in tried if not one.fits), default=None)
    report = {
        "batch_size": largest * unit,
        "clips_a_device": largest * unit / len(target.devices),
        "fails_at": failing and failing * unit,
        "tried": [(one.units * unit, one.needed, one.fits) for one in sorted(tried)],
    }
    if not largest:
        return report
    program = programs[largest]
    report["used"] = program.memory.used
    if program.time is not None:
        flops = largest * unit * model_flops(config).all
        report["mfu"] = flops / (program.time.seconds * target.peak)
    return report


def _needed(program: Program) -> int | None:
    """Bytes on a device, be there so many or not; None for what cannot be compiled."""
    if program.shortage is not None:
        return program.shortage.needed
    return program.memory.used if program.memory is not None else None
