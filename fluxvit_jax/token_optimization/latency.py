"""Latency, throughput and memory of forward passes, measured on this device.

A forward pass goes from the patches of a clip on one grid to its class scores.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from fluxvit_jax.deploy.pretrained import forward
from fluxvit_jax.grids import Grid
from fluxvit_jax.models.fluxvit import PATCH_VALUES, FluxViTConfig

MEGA, MILLI = 1e6, 1e-3

# Timed calls: a 95th percentile needs ten or more; a second of them, or a thousand, is enough.
FEWEST_CALLS, MOST_CALLS, SECONDS = 10, 1000, 1.0
ROUNDS = 20  # over which that second is spread, interleaved with the other programs
INTERLEAVED = 8  # passes timed in the same rounds: they share weights, but not pixels and code
# A large network on a CPU takes many seconds a call: three calls have to do then.
SLOW_CALLS, SLOW_SECONDS = 3, 30.0
WARM_UP_SECONDS = 0.5  # an accelerator's clock rises only under load


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Measurements of one forward pass, with the names and units of the search's report.

    milliseconds, milliseconds_p95: one clip alone, median and 95th percentile of blocking calls.
    batch_milliseconds, batch_milliseconds_p95: the same for a whole batch.
    clips_per_second: of the batch, by its median.
    peak_memory_mb: 1e6 bytes that the compiler reserves on the device for the batch's program:
        arguments (all weights, the pixels), results, temporaries and code.
    compile_seconds: tracing and compiling the programs, of one clip and of the batch; less where
        JAX's cache of compiled programs has them.
    """

    milliseconds: float
    milliseconds_p95: float
    batch_milliseconds: float
    batch_milliseconds_p95: float
    clips_per_second: float
    peak_memory_mb: float
    compile_seconds: float


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """The network, grid, budget and head of a forward pass to time."""

    model: FluxViTConfig
    grid: Grid
    budget: int
    head: int


def measure(params: dict, passes: Sequence[ForwardPass], batch: int) -> Iterator[Cost]:
    """Times forward passes on JAX's first device, each for one clip and for `batch` clips.

    A program takes the weights and uint8 patches [b, P, 588], both on the device already, and
    returns class scores, float32 [b, classes]. It is compiled ahead of time, and timed in calls
    that wait for their result, after a warm-up. Pixels are random, by seed: constant ones would
    give all patches the same score. `INTERLEAVED` passes are timed in rounds of a few calls each
    before the next ones are compiled: other load on the machine often lasts for seconds, and so
    slows all of them for part of their time instead of some of them for all of it.

    params: float32, as numpy arrays or on a device.
    """
    device = jax.devices()[0]
    params = jax.device_put(params, device)
    sizes = sorted({1, batch})
    for start in range(0, len(passes), INTERLEAVED):
        programs = [
            [_compile(params, one, clips, device) for clips in sizes]
            for one in passes[start : start + INTERLEAVED]
        ]
        seconds = iter(_steady_seconds([one.call for sized in programs for one in sized]))
        yield from [_cost(sized, [next(seconds) for _ in sized], batch) for sized in programs]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Program:
    """A compiled forward pass with the seconds its compilation took and its bytes of memory."""

    call: Callable[[], jax.Array]
    compile_seconds: float
    memory: int


def _compile(params: dict, forward_pass: ForwardPass, clips: int, device: jax.Device) -> _Program:
    model, grid = forward_pass.model, forward_pass.grid

    def logits(params: dict, patches: jax.Array) -> jax.Array:
        budget, head = forward_pass.budget, forward_pass.head
        return forward(params, patches, model, grid, budget, head)[0].logits

    pixels = np.random.default_rng(0).integers(0, 256, (clips, grid.tokens, PATCH_VALUES), np.uint8)
    arguments = params, jax.device_put(pixels, device)
    start = time.perf_counter()
    # Weights that this head does not use occupy memory all the same.
    compiled = jax.jit(logits, keep_unused=True).lower(*arguments).compile()
    return _Program(
        call=partial(compiled, *arguments),
        compile_seconds=time.perf_counter() - start,
        memory=_reserved_bytes(compiled.memory_analysis()),
    )


def _cost(programs: Sequence[_Program], seconds: Sequence[list[float]], batch: int) -> Cost:
    """programs, seconds: of one clip and of the batch, which are one program if that is 1."""
    medians = [statistics.median(calls) for calls in seconds]
    highs = [float(np.percentile(calls, 95)) for calls in seconds]
    return Cost(
        milliseconds=medians[0] / MILLI,
        milliseconds_p95=highs[0] / MILLI,
        batch_milliseconds=medians[-1] / MILLI,
        batch_milliseconds_p95=highs[-1] / MILLI,
        clips_per_second=batch / medians[-1],
        peak_memory_mb=programs[-1].memory / MEGA,
        compile_seconds=sum(program.compile_seconds for program in programs),
    )


def _steady_seconds(calls: Sequence[Callable[[], jax.Array]]) -> list[list[float]]:
    """Seconds of each program's blocking calls, without those of the warm-up."""
    for call in calls:
        call().block_until_ready()  # the first loads the program
    warming = 0.0
    while warming < WARM_UP_SECONDS:
        warming += sum(map(_seconds, calls))
    times: list[list[float]] = [[] for _ in calls]
    while not all(_enough(len(timed), sum(timed)) for timed in times):
        for call, timed in zip(calls, times, strict=True):
            if not _enough(len(timed), sum(timed)):
                timed += _time_round(call)
    return times


def _time_round(call: Callable[[], jax.Array]) -> list[float]:
    """Seconds of the calls of one round, a `ROUNDS`th of what is enough; at least of one call."""
    times = [_seconds(call)]
    while len(times) < MOST_CALLS / ROUNDS and sum(times) < SECONDS / ROUNDS:
        times.append(_seconds(call))
    return times


def _seconds(call: Callable[[], jax.Array]) -> float:
    start = time.perf_counter()
    call().block_until_ready()
    return time.perf_counter() - start


def _enough(calls: int, seconds: float) -> bool:
    if calls >= MOST_CALLS or (calls >= SLOW_CALLS and seconds >= SLOW_SECONDS):
        return True
    return calls >= FEWEST_CALLS and seconds >= SECONDS


def _reserved_bytes(memory: Any) -> int:
    """Bytes that a program holds while it runs, by its `memory_analysis`; aliases count once."""
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        - memory.alias_size_in_bytes
    )
