"""Search for the largest batch that fits, by compiling a few."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fluxvit_jax.preflight.compiler.memory import tree_bytes
from fluxvit_jax.preflight.compiler.program import Program
from fluxvit_jax.preflight.programs import model_flops
from fluxvit_jax.preflight.target import Target

PROBES = 4  # compiles at most
GROWTH = 8  # of the batch from one compile to the next, at most

Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trial:
    """A compiled batch of `units` units, and the bytes that it needs."""

    units: int
    needed: int
    fits: bool


def search_largest(
    first: Trial, fixed: int, available: int, compile_units: Callable[[int], Trial]
) -> list[Trial]:
    """All trials in search of the largest batch that fits, of which `first` is given.

    Memory grows about linearly with the batch, so a line through the known trials proposes the next
    batch, at most `GROWTH` times the largest that fits, and compiling verifies it. The search ends
    when the next larger batch failed, or would not fit by that line.

    fixed: bytes that do not depend on the batch, about.
    """
    trials = [first]
    for _ in range(PROBES):
        largest, failing = _largest(trials), _smallest_failing(trials)
        proposed = _fitting_units(trials, fixed, available)
        if failing is not None:
            proposed = min(proposed, failing - 1)
        proposed = min(proposed, GROWTH * largest) if largest else max(proposed, 1)
        if proposed <= largest or proposed == failing:
            break
        trials.append(compile_units(proposed))
    return trials


def _largest(trials: Sequence[Trial]) -> int:
    return max((trial.units for trial in trials if trial.fits), default=0)


def _smallest_failing(trials: Sequence[Trial]) -> int | None:
    return min((trial.units for trial in trials if not trial.fits), default=None)


def _fitting_units(trials: Sequence[Trial], fixed: int, available: int) -> int:
    """Units that fit by the line through the two trials nearest to the available memory."""
    known = {0: fixed} | {trial.units: trial.needed for trial in trials}
    a, b = sorted(known, key=lambda units: abs(known[units] - available))[:2]
    slope = max((known[b] - known[a]) / (b - a), 1.0)
    return math.floor(a + (available - known[a]) / slope)


def largest_batch(target: Target, training: Program) -> Report:
    """The report of the search; training: the training step, of a device with known memory."""
    assert training.available is not None
    config, unit, available = target.config, target.unit, training.available
    programs = {config.train.batch_size // unit: training}

    def compile_units(units: int) -> Trial:
        if units not in programs:
            larger = config.copy_and_resolve_references()
            larger.train.batch_size = units * unit
            programs[units] = target.compile_training(larger)
        program = programs[units]
        # A failure for another reason counts as just too large.
        return Trial(units, _needed(program) or available + 1, program.fits)

    first = compile_units(config.train.batch_size // unit)
    trials = search_largest(first, tree_bytes(target.state), available, compile_units)
    largest, failing = _largest(trials), _smallest_failing(trials)
    report = {
        "batch_size": largest * unit,
        "clips_a_device": largest * unit / len(target.devices),
        "fails_at": failing and failing * unit,
        "tried": [
            (trial.units * unit, trial.needed, trial.fits)
            for trial in sorted(trials, key=lambda trial: trial.units)
        ],
    }
    if not largest:
        return report
    program = programs[largest]
    assert program.memory is not None  # it fits
    report["used"] = program.memory.used
    if program.time is not None:
        flops = largest * unit * model_flops(config).all
        report["mfu"] = flops / (program.time.seconds * target.peak)
    return report


def _needed(program: Program) -> int | None:
    """Bytes on a device, available or not; None for a program that cannot be compiled."""
    if program.shortage is not None:
        return program.shortage.needed
    return program.memory.used if program.memory is not None else None
