"""Work, time and memory: against the paper's figures, the traced program, and real runs."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import astuple, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from fluxvit_jax.config.fields import default_config
from fluxvit_jax.config.network import model_config
from fluxvit_jax.grids import Grid, kept_tokens
from fluxvit_jax.models import fluxvit, position_embedding
from fluxvit_jax.models.flops import gflops
from fluxvit_jax.models.fluxvit import PATCH_VALUES, FluxViTConfig
from fluxvit_jax.models.token_selection import NOISY_SELECTORS
from fluxvit_jax.token_optimization import latency

# GFLOPs of one clip with 400 classes by tokens, as the paper gives them.
PAPER = {
    "S": {3072: 154, 2048: 83, 1024: 32, 512: 13},
    "B": {3072: 440, 2048: 255, 1024: 108, 512: 49},
}
SETTINGS = {3072: (20, 16), 2048: (16, 14), 1024: (12, 12), 512: (8, 12)}  # frames, side


def variant(name: str, **changes) -> FluxViTConfig:
    return replace(model_config(default_config(name)), **changes)


def kept_gflops(name: str, budget: int) -> float:
    frames, side = SETTINGS[budget]
    return gflops(variant(name), Grid(frames, side, side), budget).kept


@pytest.mark.parametrize(
    ("name", "budget"),
    [(name, budget) for name in PAPER for budget in PAPER[name] if (name, budget) != ("S", 512)],
)
def test_the_papers_figures(name, budget):
    assert round(kept_gflops(name, budget)) == PAPER[name][budget]
    assert kept_gflops(name, budget) == pytest.approx(PAPER[name][budget], rel=0.01)


def test_the_papers_figure_of_s_at_512():
    """512 tokens are 13.59 for S, where the paper says 13.

    The official rounding keeps fewer on some grids, 508 on 8 frames of 196 px: 13.46. That this is
    how the paper came to 13 is our explanation, not the paper's; its 49 for B holds either way.
    """
    grid = Grid(8, 14, 14)
    assert kept_gflops("S", 512) == pytest.approx(13.586, abs=5e-4)
    assert kept_tokens(grid, 512, "official") == 508
    for name in PAPER:
        official = gflops(variant(name, rounding="official"), grid, 512)
        assert round(official.kept) == PAPER[name][512]


# ---------------------------------------------------------------------------------------------
# Against the program itself


def multiply_accumulates(function, *arguments) -> int:
    """Of all products of matrices that `function` needs for its result, as it is traced."""
    closed = jax.make_jaxpr(function)(*arguments)
    needed, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return sum(products(needed))


def products(jaxpr) -> Iterator[int]:
    """Multiply-accumulates of each product, inside loops as often as they run."""
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            left = equation.invars[0].aval.shape
            terms = math.prod(left[axis] for axis in contracted)
            yield math.prod(equation.outvars[0].aval.shape) * terms
        assert "conv_" not in name, "a convolution has to be counted as well"
        inner = sum(sum(products(program)) for program in inner_programs(parameters))
        assert not (inner and name in ("while", "cond")), f"{name}: nobody knows how often it runs"
        yield inner * (parameters["length"] if name == "scan" else 1)


def inner_programs(parameters: dict) -> Iterator:
    for leaf in jax.tree.leaves(list(parameters.values())):
        if hasattr(leaf, "eqns"):  # of both Jaxpr and ClosedJaxpr
            yield getattr(leaf, "jaxpr", leaf)


def test_products_are_counted():
    """The counter itself: loops, and what is dropped because nobody needs it."""
    x, y = jnp.ones((2, 3, 4)), jnp.ones((4, 5))

    def looped(x, y):
        return jax.lax.scan(lambda carry, one: (carry, jax.jit(jnp.dot)(one, y)), 0.0, x)[1]

    def partly_needed(x, y):
        return [jax.checkpoint(jnp.dot)(x, y), x @ jnp.ones((4, 9))][0]

    assert multiply_accumulates(jnp.dot, x, y) == 2 * 3 * 4 * 5
    assert multiply_accumulates(looped, x, y) == 2 * 3 * 4 * 5
    assert multiply_accumulates(partly_needed, x, y) == 2 * 3 * 4 * 5


@cache
def abstract_params(model: FluxViTConfig) -> dict:
    return jax.eval_shape(lambda: fluxvit.init_params(model, jax.random.key(0)))


def traced_work(model: FluxViTConfig, grid: Grid, budget: int, clips: int) -> int:
    """Multiply-accumulates of `on_grid` from patches to logits."""

    def logits(params, patches):
        network = fluxvit.from_params(fluxvit.graphdef(model), params)
        key = jax.random.key(0) if model.selector in NOISY_SELECTORS else None
        return network.on_grid(patches, grid, budget, head=1, key=key).logits

    patches = jax.ShapeDtypeStruct((clips, grid.tokens, PATCH_VALUES), jnp.dtype(model.dtype))
    return multiply_accumulates(logits, abstract_params(model), patches)


def resizing_work(model: FluxViTConfig, grid: Grid) -> int:
    """Of the position table's resize, which a batch does once and the formula leaves out."""
    native = (model.frames, model.rows, model.columns, model.width)
    return multiply_accumulates(
        lambda table, sides: position_embedding.resize_table(table, sides, tuple(grid)),
        jax.ShapeDtypeStruct(native, jnp.float32),
        jax.ShapeDtypeStruct((3,), jnp.int32),
    )


def formula_work(model: FluxViTConfig, grid: Grid, budget: int) -> int:
    """`all` without the frame differences, which are no products of matrices."""
    merges = model.merge_blocks and budget - (model.cls == "inside") < grid.tokens
    compares = not merges and model.selector in ("group_dynamic", "dynamic_l1", "dynamic_l2")
    differences = grid.tokens * model.width if compares else 0
    return round(gflops(model, grid, budget).all * 1e9) - differences


@pytest.mark.parametrize(
    ("name", "grid", "budget", "changes"),
    [
        ("Ti", Grid(5, 3, 4), 20, {}),
        ("Ti", Grid(5, 3, 4), 20, {"cls": "inside"}),
        ("Ti", Grid(5, 3, 4), 20, {"scan": False}),
        ("Ti", Grid(5, 3, 4), 20, {"remat": "full"}),
        ("Ti", Grid(8, 14, 14), 512, {"rounding": "official"}),
        ("Ti", Grid(5, 3, 4), 60, {}),
        ("Ti", Grid(5, 3, 4), 60, {"cls": "inside"}),
        ("Ti", Grid(5, 3, 4), 61, {"cls": "inside"}),
        ("Ti", Grid(5, 3, 4), 999, {"classes": 7, "dtype": "float32"}),
        ("Ti", Grid(1, 4, 4), 9, {"selector": "dynamic_l1"}),
        ("Ti", Grid(4, 4, 4), 9, {"selector": "random"}),
        ("Ti", Grid(4, 4, 4), 64, {"selector": "none"}),
        ("S", Grid(12, 12, 12), 1024, {}),
        ("S", Grid(8, 12, 12), 512, {"cls": "inside", "scan": False}),
        ("S", Grid(4, 16, 16), 1024, {}),
        ("Ti", Grid(5, 3, 4), 31, {"merge_blocks": 1}),
        ("Ti", Grid(5, 3, 4), 16, {"merge_blocks": 2, "cls": "inside"}),
        ("Ti", Grid(5, 3, 5), 74, {"merge_blocks": 2}),  # one of the blocks merges nothing
        ("Ti", Grid(5, 3, 4), 60, {"merge_blocks": 2}),  # nothing to merge: selection runs
        ("Ti", Grid(5, 3, 4), 60, {"merge_blocks": 2, "cls": "inside"}),
        ("S", Grid(12, 12, 12), 512, {"merge_blocks": 4}),
        ("S", Grid(5, 9, 9), 102, {"merge_blocks": 12, "scan": False}),
    ],
)
def test_all_that_the_program_multiplies(name, grid, budget, changes):
    model = variant(name, **changes)
    one, resizing = formula_work(model, grid, budget), resizing_work(model, grid)
    for clips in (1, 3):
        assert traced_work(model, grid, budget, clips) == clips * one + resizing


def test_kept_leaves_out_the_choice_alone():
    model, grid = variant("S"), Grid(12, 12, 12)
    work = gflops(model, grid, 1024)
    choice = grid.tokens * model.width * (PATCH_VALUES + 1)
    assert work.all - work.kept == pytest.approx(choice / 1e9)


def test_merging_costs_more_than_selection():
    grid = Grid(12, 12, 12)
    selected = gflops(variant("S"), grid, 1024)
    merged = gflops(variant("S", merge_blocks=4), grid, 1024)
    assert merged.all == merged.kept > selected.all
    assert merged.all < gflops(variant("S"), grid, grid.tokens).kept
    with pytest.raises(ValueError, match="1 merging blocks cannot bring 1728 patches down to 512"):
        gflops(variant("S", merge_blocks=1), grid, 512)


# ---------------------------------------------------------------------------------------------
# Real runs


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """What JAX hands to the compiler while the test runs."""
    seen = []

    def listen(event: str, seconds: float, **details) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(str(details))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


MODEL = variant("Ti", classes=7)
GRID, BUDGET = Grid(4, 3, 3), 12


def random_params(model: FluxViTConfig) -> dict:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), abstract_params(model)
    )


def bytes_of(params: dict) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.fixture(scope="module")
def params() -> dict:
    return random_params(MODEL)


def measure(params, model, head=0, batch=1) -> latency.Cost:
    (cost,) = latency.measure(params, [latency.ForwardPass(model, GRID, BUDGET, head)], batch)
    return cost


def test_a_measured_batch(params, compilations):
    cost = measure(params, MODEL, head=2, batch=3)
    assert len(compilations) == 2, compilations
    assert all(math.isfinite(value) and value > 0 for value in astuple(cost))
    assert cost.milliseconds <= cost.milliseconds_p95
    assert cost.batch_milliseconds <= cost.batch_milliseconds_p95
    assert cost.clips_per_second == pytest.approx(3 / (cost.batch_milliseconds / 1000))
    assert cost.peak_memory_mb * 1e6 > bytes_of(params) + 3 * GRID.tokens * PATCH_VALUES


@pytest.mark.slow
def test_several_take_turns(params, compilations, monkeypatch):
    """Each is timed as if alone, but a few calls at a time."""
    turns, turn = [], latency._time_round

    def note(call):
        turns.append(id(call))
        return turn(call)

    monkeypatch.setattr(latency, "_time_round", note)
    monkeypatch.setattr(latency, "INTERLEAVED", 2)
    passes = [latency.ForwardPass(MODEL, GRID, budget, 0) for budget in (9, 12, 15)]
    measuring = latency.measure(params, passes, batch=2)
    found = list(itertools.islice(measuring, 2))
    assert len(found) == 2 and len(compilations) == 4
    assert all(math.isfinite(value) and value > 0 for cost in found for value in astuple(cost))
    assert len(set(turns[:4])) == 4 and turns[4:8] == turns[:4]
    assert len(list(measuring)) == 1 and len(compilations) == 6


def test_a_batch_of_one_is_one_program(params, compilations):
    cost = measure(jax.device_put(params), MODEL)
    assert len(compilations) == 1, compilations
    assert cost.batch_milliseconds == cost.milliseconds > 0
    assert cost.batch_milliseconds_p95 == cost.milliseconds_p95
    assert cost.clips_per_second == pytest.approx(1000 / cost.milliseconds)


def test_memory_holds_weights_that_the_head_does_not_use(params):
    larger = replace(MODEL, budgets=12)
    more = random_params(larger)
    few, many = (
        measure(own, model).peak_memory_mb * 1e6 for own, model in ((params, MODEL), (more, larger))
    )
    assert many - few == pytest.approx(bytes_of(more) - bytes_of(params), rel=0.01)


@pytest.mark.parametrize(
    "changes", [{"selector": "random"}, {"cls": "inside"}, {"merge_blocks": 2}]
)
def test_other_networks_are_measured(params, changes):
    cost = measure(params, replace(MODEL, **changes))
    assert math.isfinite(cost.milliseconds) and cost.milliseconds > 0


@pytest.mark.parametrize(
    ("calls", "seconds", "enough"),
    [
        (9, 1.1, False),
        (10, 1.1, True),
        (999, 0.9, False),
        (1000, 0.1, True),
        (3, 29.0, False),
        (2, 50.0, False),
        (3, 31.0, True),
    ],
)
def test_when_calls_are_enough(calls, seconds, enough, monkeypatch):
    monkeypatch.setattr(latency, "SECONDS", 1.0)
    assert latency._enough(calls, seconds) == enough
