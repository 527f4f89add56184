"""What a forward pass costs: multiply-accumulates by formula, time and memory by measurement.

All is of the plain forward pass, from the patches of a clip on one grid to its class scores.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from fluxvit_jax.budgets import Grid, kept_tokens
from fluxvit_jax.models.decoders import DecodersConfig
from fluxvit_jax.models.fluxvit import PATCH_VALUES, FluxViTConfig
from fluxvit_jax.models.internvideo2 import InternVideo2Config
from fluxvit_jax.models.merging import schedule
from fluxvit_jax.models.selection import NOISY_SELECTORS
from fluxvit_jax.pretrained import forward

GIGA, MEGA, MILLI = 1e9, 1e6, 1e-3

# Calls that are timed: a p95 wants ten or more; a second of them, or a thousand, is enough.
FEWEST_CALLS, MOST_CALLS, SECONDS = 10, 1000, 1.0
TURNS = 20  # in which that second is spent, in turn with the other programs
TOGETHER = 8  # passes that take turns: their weights are one, but not their pixels and their code
# A large network on a CPU takes many seconds a call: three of them must do then.
SLOW_CALLS, SLOW_SECONDS = 3, 30.0
WARM_UP_SECONDS = 0.5  # an accelerator's clock rises only under load


class Work(NamedTuple):
    """1e9 multiply-accumulates of one clip's forward pass (the paper calls them GFLOPs).

    all: what the program does; kept: as the paper counts, without the choice of the tokens.
    """

    all: float
    kept: float


class Cost(NamedTuple):
    """What `measure` finds. Names and units are those of the search's report.

    milliseconds, milliseconds_p95: one clip alone, median and 95th percentile of blocking calls.
    batch_milliseconds, batch_milliseconds_p95: likewise a whole batch.
    clips_per_second: of the batch, by its median.
    peak_memory_mb: 1e6 bytes that the compiler reserves on the device for the batch's program:
        arguments (all weights, the pixels), results, temporaries and code.
    compile_seconds: tracing and compiling the programs, of one clip and of the batch; less where
        JAX's cache of compiled programs knows them.
    """

    milliseconds: float
    milliseconds_p95: float
    batch_milliseconds: float
    batch_milliseconds_p95: float
    clips_per_second: float
    peak_memory_mb: float
    compile_seconds: float


def gflops(model: FluxViTConfig, grid: Grid, budget: int) -> Work:
    """The work of one clip on `grid` at a token budget, by formula.

    Counted are products of matrices; N tokens, of which CLS is one:
        a block: 12 C^2 a token (q, k, v 3, projection 1, MLP 8) and 2 N^2 C of attention;
        the patch embedding: 588 C a patch;
        the pooling head: k and v of every token, q, attention and projection of one query;
        the classifier.
    `kept` embeds the kept patches only, as many as `model.rounding` keeps.
    `all` is what `FluxViT.on_grid` does: it embeds every patch of the grid for the selection and
    the kept ones once more, takes the frame differences (C a patch), and computes all places of
    the budget, those that the official rounding masks as well. A budget of the whole grid changes
    nothing about that. Selectors that draw their scores do not look at the patches, so for them
    the compiler drops the first embedding.

    Left out of both is what does not grow with the clips: the position table is resized once for a
    whole batch (0.25 for S on 12 x 168 px), and its result could be kept.

    Where `model.merge_blocks` blocks merge tokens, all patches enter and are embedded once; the
    similarities by which they are merged are counted too. As what is merged has to be computed
    first, there is no cheaper way to count, and `kept` equals `all`.

    Raises ValueError where so many blocks cannot reach the budget.
    """
    patch_budget = budget - (model.cls == "inside")
    if model.merge_blocks and patch_budget < grid.tokens:
        merged = _merging_work(model, grid, patch_budget) / GIGA
        return Work(merged, merged)
    places = min(patch_budget, grid.tokens)
    kept = kept_tokens(grid, patch_budget, model.rounding)
    return Work(
        all=(_selection_work(model, grid) + _encoding_work(model, places)) / GIGA,
        kept=_encoding_work(model, kept) / GIGA,
    )


def features_gflops(model: FluxViTConfig | InternVideo2Config, patches: int) -> float:
    """1e9 multiply-accumulates from so many patches to the clip vector of one pooling head."""
    return _features_work(model, patches) / GIGA


def decoders_gflops(decoders: DecodersConfig, patches: int) -> float:
    """1e9 multiply-accumulates of all decoders of a student with so many patches."""
    tokens = decoders.width * (decoders.width + decoders.target_width) * (patches + 1)
    pooled = decoders.pool_width * (decoders.pool_width + decoders.target_pool_width)
    return (decoders.count * tokens + pooled) / GIGA


def _embedding_work(model: FluxViTConfig | InternVideo2Config, patches: int) -> int:
    return PATCH_VALUES * model.width * patches


def _selection_work(model: FluxViTConfig, grid: Grid) -> int:
    """What choosing the patches takes: to embed them all and to compare frames."""
    if model.selector in ("none", *NOISY_SELECTORS):
        return 0
    return _embedding_work(model, grid.tokens) + model.width * grid.tokens


def _encoding_work(model: FluxViTConfig, patches: int) -> int:
    """From so many patches to class scores, all of them in every block.

    CLS has a row in the embedding as well, of which nothing comes (`sequence.behind_cls`).
    """
    return _features_work(model, patches) + _classifier_work(model)


def _features_work(model: FluxViTConfig | InternVideo2Config, patches: int) -> int:
    tokens = patches + 1
    blocks = model.depth * _block_work(model, tokens, tokens)
    return _embedding_work(model, tokens) + blocks + _pooling_work(model, tokens)


def _merging_work(model: FluxViTConfig, grid: Grid, patch_budget: int) -> int:
    """All patches enter; each of the first blocks merges some between attention and MLP."""
    counts = (grid.tokens, *schedule(grid.tokens, patch_budget, model.merge_blocks))
    last = counts[-1]
    merging = sum(
        _block_work(model, before + 1, after + 1) + _matching_work(model, before, after)
        for before, after in itertools.pairwise(counts)
    )
    others = (model.depth - model.merge_blocks) * _block_work(model, last + 1, last + 1)
    head = _pooling_work(model, last + 1) + _classifier_work(model)
    return _embedding_work(model, grid.tokens + 1) + merging + others + head


def _matching_work(model: FluxViTConfig, before: int, after: int) -> int:
    """Similarities of one half of the patches to the other, by the mean of the heads' keys."""
    if after == before:
        return 0
    half = before // 2
    return half * (before - half) * (model.width // model.heads)


def _block_work(model: FluxViTConfig | InternVideo2Config, attending: int, remaining: int) -> int:
    """A block with so many tokens in its attention and, after merging, in its MLP."""
    C = model.width
    attention = 4 * C * C * attending + 2 * attending**2 * C
    return attention + 2 * C * model.hidden * remaining


def _pooling_work(model: FluxViTConfig | InternVideo2Config, tokens: int) -> int:
    """Attention pooling with one query."""
    C = model.width
    keys_values = 2 * C * C * tokens
    return keys_values + C * C + 2 * C * tokens + C * model.pool_width


def _classifier_work(model: FluxViTConfig) -> int:
    return model.pool_width * model.classes


class Pass(NamedTuple):
    """A forward pass to time: the network, and how it is asked."""

    model: FluxViTConfig
    grid: Grid
    budget: int
    head: int


def measure(params: dict, passes: Sequence[Pass], batch: int) -> Iterator[Cost]:
    """Times forward passes on JAX's first device, each for one clip and for `batch` clips.

    A program takes the weights and uint8 patches [b, P, 588], both on the device already, and
    returns class scores, float32 [b, classes]. It is compiled ahead of time, and timed in calls
    that wait for their result, after warming up. Pixels are random, by seed: equal ones would all
    score alike. `TOGETHER` passes take turns, a few calls each, before the next are compiled:
    what else a machine does, it often does for seconds, and so it hits all of them for a part of
    their time instead of some for all of it.

    params: float32, as numpy arrays or on a device.
    """
    device = jax.devices()[0]
    params = jax.device_put(params, device)
    sizes = sorted({1, batch})
    for start in range(0, len(passes), TOGETHER):
        programs = [
            [_compile(params, one, clips, device) for clips in sizes]
            for one in passes[start : start + TOGETHER]
        ]
        seconds = iter(_steady_seconds([one.call for own in programs for one in own]))
        yield from [_cost(own, [next(seconds) for _ in own], batch) for own in programs]


class _Program(NamedTuple):
    """A compiled forward pass; seconds that compiling it took, bytes of memory it holds."""

    call: Callable[[], jax.Array]
    compiling: float
    memory: int


def _compile(params: dict, one: Pass, clips: int, device: jax.Device) -> _Program:
    model, grid, budget, head = one

    def logits(params, patches):
        return forward(params, patches, model, grid, budget, head)[0].logits

    pixels = np.random.default_rng(0).integers(0, 256, (clips, grid.tokens, PATCH_VALUES), np.uint8)
    arguments = params, jax.device_put(pixels, device)
    start = time.perf_counter()
    # Weights that this head does not use lie in memory all the same.
    compiled = jax.jit(logits, keep_unused=True).lower(*arguments).compile()
    compiling = time.perf_counter() - start
    return _Program(
        partial(compiled, *arguments), compiling, _reserved_bytes(compiled.memory_analysis())
    )


def _cost(programs: Sequence[_Program], seconds: Sequence[list[float]], batch: int) -> Cost:
    """programs, seconds: of one clip and of the batch, which are one program if that is 1."""
    medians = [statistics.median(own) for own in seconds]
    highs = [float(np.percentile(own, 95)) for own in seconds]
    return Cost(
        milliseconds=medians[0] / MILLI,
        milliseconds_p95=highs[0] / MILLI,
        batch_milliseconds=medians[-1] / MILLI,
        batch_milliseconds_p95=highs[-1] / MILLI,
        clips_per_second=batch / medians[-1],
        peak_memory_mb=programs[-1].memory / MEGA,
        compile_seconds=sum(program.compiling for program in programs),
    )


def _steady_seconds(calls: Sequence[Callable[[], jax.Array]]) -> list[list[float]]:
    """Seconds of some calls of each program that wait for their result, those that warm up not."""
    for call in calls:
        call().block_until_ready()  # the first loads the program
    warming = 0.0
    while warming < WARM_UP_SECONDS:
        warming += sum(map(_seconds, calls))
    taken = [[] for _ in calls]
    while not all(_enough(len(own), sum(own)) for own in taken):
        for call, own in zip(calls, taken, strict=True):
            if not _enough(len(own), sum(own)):
                own += _turn(call)
    return taken


def _turn(call: Callable[[], jax.Array]) -> list[float]:
    """Seconds of the calls of one turn, a `TURNS`th of what is enough; at least of one."""
    taken = [_seconds(call)]
    while len(taken) < MOST_CALLS / TURNS and sum(taken) < SECONDS / TURNS:
        taken.append(_seconds(call))
    return taken


def _seconds(call: Callable[[], jax.Array]) -> float:
    start = time.perf_counter()
    call().block_until_ready()
    return time.perf_counter() - start


def _enough(calls: int, seconds: float) -> bool:
    if calls >= MOST_CALLS or (calls >= SLOW_CALLS and seconds >= SLOW_SECONDS):
        return True
    return calls >= FEWEST_CALLS and seconds >= SECONDS


def _reserved_bytes(memory) -> int:
    """What a program holds while it runs, of `memory_analysis`; what shares a place counts once."""
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        - memory.alias_size_in_bytes
    )
