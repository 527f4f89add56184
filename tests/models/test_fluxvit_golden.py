"""Our network against numbers of the official PyTorch code."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.token_selection import (
    GridLimits,
    Selection,
    group_of_frame,
    kept_tokens,
    num_groups,
    token_scores,
)
from tests.models import golden

CASES = golden.manifest("tiny_cases")["cases"]
VIDEOS = golden.manifest("tiny_cases")["videos"]
# For these three the official code adds positions of a grid that is not the video's.
QUIRKS = {name for name, video in VIDEOS.items() if "QUIRK" in video["note"]}
GOOD_CASES = [case for case in CASES if case["video"] not in QUIRKS]
CAPACITY = 464  # above the largest video's 432 tokens
LIMITS = GridLimits(32, 6, 8, 16)


def close(ours, official, tolerance=1e-5):
    np.testing.assert_allclose(ours, official, rtol=tolerance, atol=tolerance)


def data(name: str) -> np.ndarray:
    return golden.arrays("tiny_cases")[name]


def budget_of(case: dict) -> int:
    return case["budget"] or case["total_tokens"]


def mask_of(kept, clip: int, total: int) -> np.ndarray:
    """The official mask of one clip: bool [total], True where dropped."""
    dropped = np.ones(total, bool)
    dropped[np.asarray(kept.token_index[clip])[np.asarray(kept.valid[clip])]] = False
    return dropped


@partial(jax.jit, static_argnames=("budget", "limits"))
def select(patches, grid, budget, limits):
    return golden.tiny_model().select(patches, grid, budget, limits)


@jax.jit
def every_head(patches, grid, index, valid):
    """All outputs of a batch in one program: logits, vectors and their two projections by head."""
    model, kept = golden.tiny_model(), Selection(index, valid)
    position = model.position(grid, kept.token_index, LIMITS)
    tokens = model.encode(fluxvit.gather_tokens(patches, kept), position, kept)
    pooled = [model.pool_tokens(tokens, kept, head) for head in range(3)]
    logits = [model.classify(vector, head) for head, vector in enumerate(pooled)]
    return logits, pooled, [[model.project(vector, p) for p in range(2)] for vector in pooled]


@cache
def one_batch_of_all():
    """Two clips of every case side by side, padded to CAPACITY: grids differ, budgets too.

    Returns the outputs and the selection. The order in which tokens are kept is that of every
    budget; how many of them are kept is each case's own.
    """
    batches = [golden.batch(data(f"{case['video']}.x")[:2], CAPACITY) for case in GOOD_CASES]
    patches, grid = (jnp.concatenate(parts) for parts in zip(*batches, strict=True))
    order = select(patches, grid, CAPACITY, LIMITS)
    total, groups = jnp.prod(grid, axis=1), num_groups(grid[:, 0])
    kept = [
        kept_tokens(total[2 * n], groups[2 * n], budget_of(case), CAPACITY, "official")
        for n, case in enumerate(GOOD_CASES)
    ]
    valid = jnp.arange(CAPACITY) < jnp.repeat(jnp.stack(kept), 2)[:, None]
    return every_head(patches, grid, order.token_index, valid), Selection(order.token_index, valid)


def check_outputs(case, logits, pooled, projected):
    close(logits, data(case["outputs"]["logits"])[:2])
    close(pooled, data(case["outputs"]["x_final"])[:2])
    close(projected, data(case["outputs"]["projected"])[:2])


@pytest.mark.parametrize("number", range(len(GOOD_CASES)), ids=lambda n: GOOD_CASES[n]["id"])
def test_padded_in_a_batch_of_differing_grids(number):
    case = GOOD_CASES[number]
    (logits, pooled, projected), kept = one_batch_of_all()
    head, projector = case["kwargs"]["output_head"], case["kwargs"]["align_proj"]
    rows = slice(2 * number, 2 * number + 2)
    check_outputs(case, logits[head][rows], pooled[head][rows], projected[head][projector][rows])
    if "mask" in case["outputs"]:
        masks = [mask_of(kept, 2 * number + clip, case["total_tokens"]) for clip in range(2)]
        np.testing.assert_array_equal(masks, data(case["outputs"]["mask"])[:2])


@pytest.mark.parametrize("id", ["c00", "c15", "c25", "c32", "c44", "c51"])
def test_alone_without_padding(id):
    case = next(c for c in CASES if c["id"] == id)
    head, projector = case["kwargs"]["output_head"], case["kwargs"]["align_proj"]
    patches, grid = golden.batch(data(f"{case['video']}.x"))
    limits = golden.limits_of(tuple(grid[0].tolist()))

    @jax.jit
    def forward(patches, grid):
        model = golden.tiny_model()
        logits, pooled = model(patches, grid, budget_of(case), head, limits)
        return logits[:2], pooled[:2], model.project(pooled, projector)[:2]

    check_outputs(case, *forward(patches, grid))


@jax.jit
def embed(patches):
    return golden.tiny_model().patch_embed(patches)


@pytest.mark.parametrize("name", VIDEOS)
def test_patch_embedding(name):
    patches, _ = golden.batch(data(f"{name}.x")[:1], CAPACITY)
    official = data(f"{name}.patch_embed")
    tokens = np.prod(golden.patches_of(data(f"{name}.x"))[1])
    close(embed(patches)[0, :tokens].reshape(official.shape), official)


@jax.jit
def importance(patches, grid):
    tokens = golden.tiny_model().patch_embed(patches)
    return token_scores("group_dynamic", tokens, grid, num_groups(grid[:, 0]), None)


@pytest.mark.parametrize("name", [n for n in VIDEOS if "importance" in VIDEOS[n]])
def test_importance(name):
    patches, grid = golden.batch(data(f"{name}.x"), CAPACITY)
    official = data(f"{name}.importance")
    scores = importance(patches, grid)
    total = int(np.prod(grid[0]))
    close(scores[:, :total].reshape(official.shape), official)


@jax.jit
def every_position(grid):
    """Positions of CLS and all places of a grid, [1 + CAPACITY, C]; past its tokens they mean
    nothing.
    """
    return golden.tiny_model().position(grid[None], jnp.arange(CAPACITY)[None], LIMITS)[0]


@pytest.mark.parametrize("name", VIDEOS)
def test_positions(name):
    grid = golden.patches_of(data(f"{name}.x"))[1]
    ours = every_position(jnp.asarray(grid))[None, : 1 + np.prod(grid)]
    official = data(f"{name}.pos_embed")
    if name in QUIRKS:
        assert np.abs(ours - official)[:, 1:].max() > 0.1
    else:
        close(ours, official)


def test_quirks_are_right_here():
    """Where the official code adds a wrong grid's positions, ours are PyTorch's resize per axis.

    A clip of 1 x 4 patches of a table that varies along the columns alone equals the row of a
    square clip of 4 x 4 patches of the same table.
    """
    params = golden.tiny_params()
    columns = np.array(params["pos_embed"][1:]).reshape(8, 4, 4, -1)[:, :1]
    table = np.broadcast_to(columns, (8, 4, 4, 48)).reshape(-1, 48)
    table = np.concatenate([params["pos_embed"][:1], table])
    model = fluxvit.from_params(
        fluxvit.graphdef(golden.TINY), params | {"pos_embed": jnp.asarray(table)}
    )
    position = jax.jit(
        lambda grid: model.position(grid[None], jnp.arange(256)[None], LIMITS)[0, 1:]
    )

    def frames(*grid):
        return position(jnp.asarray(grid))[: np.prod(grid)].reshape(*grid, -1)

    close(frames(8, 1, 4)[:, 0], frames(8, 4, 4)[:, 0])
    close(frames(8, 2, 8)[:, 0], frames(8, 4, 8)[:, 0])


@cache
def tokens_by_depth(id):
    """What each block of a case puts out, in the official order of tokens: [B, 1 + N, C] each."""
    case = next(case for case in CASES if case["id"] == id)
    patches, grid = golden.batch(data(f"{case['video']}.x"))
    limits = golden.limits_of(tuple(grid[0].tolist()))
    kept = select(patches, grid, case["budget"], limits)
    params = golden.tiny_params()

    @jax.jit
    def encode(patches):
        outputs = []
        for depth in range(1, golden.TINY.depth + 1):
            blocks = jax.tree.map(lambda leaf, depth=depth: leaf[:depth], params["blocks"])
            graph = fluxvit.graphdef(replace(golden.TINY, depth=depth))
            model = fluxvit.from_params(graph, params | {"blocks": blocks})
            position = model.position(grid, kept.token_index, limits)
            outputs.append(model.encode(fluxvit.gather_tokens(patches, kept), position, kept))
        return outputs

    order = np.asarray(kept.token_index).argsort(axis=1)[..., None]
    tokens = [np.asarray(output) for output in encode(patches)]
    sorted_ = [np.take_along_axis(output[:, 1:], order, axis=1) for output in tokens]
    return [np.concatenate([a[:, :1], b], axis=1) for a, b in zip(tokens, sorted_, strict=True)]


@pytest.mark.parametrize("id", [case["id"] for case in CASES if "trace" in case])
@pytest.mark.parametrize("block", range(golden.TINY.depth))
def test_traces(id, block):
    case = next(case for case in CASES if case["id"] == id)
    close(tokens_by_depth(id)[block], data(case["trace"][f"block{block}"]))


# Groups of a clip of 1, 2, ... 32 frames. The official code has 4 for 4 frames, and fails.
GROUPS = (1, 1, 1, 2, 2, 2, 2, 4, 2, 2, 2, 4, 2, 2, 2, 4, *(2, 2, 2, 4) * 4)


@pytest.mark.parametrize(("T", "expected"), list(enumerate(GROUPS, start=1)))
def test_groups_of_frames(T, expected):
    groups = int(num_groups(jnp.asarray(T)))
    assert groups == expected
    member = np.asarray(group_of_frame(jnp.arange(T), T, groups))
    sizes = np.bincount(member)
    assert len(sizes) == groups and (np.diff(member) >= 0).all()
    assert sizes.max() - sizes.min() <= 1


@partial(jax.jit, static_argnames="budget")
def forward(patches, grid, budget):
    limits = GridLimits(8, 4, 4, 16)
    model = golden.tiny_model(rounding="exact")
    return model.select(patches, grid, budget, limits), model(patches, grid, budget, 2, limits)


@pytest.mark.parametrize("sides", [(8, 4, 4), (4, 4, 4), (5, 4, 4), (1, 4, 4), (8, 2, 4)])
def test_what_the_official_code_refuses(sides):
    """Batch 1, which is all that is wrong with the first; then four frames, odd frames, one frame,
    and sides whose product is no square."""
    rng = np.random.default_rng(0)
    patches = jnp.asarray(rng.normal(size=(2, 128, 588)), jnp.float32)
    grid, budget = jnp.tile(jnp.asarray(sides), (2, 1)), 8
    outputs = [forward(patches[:clips], grid[:clips], budget) for clips in (1, 2)]
    for clips, (kept, (logits, pooled)) in enumerate(outputs, start=1):
        assert kept.valid is None and kept.token_index.shape == (clips, budget)
        assert all(len(set(row.tolist())) == budget for row in np.asarray(kept.token_index))
        assert np.max(kept.token_index) < np.prod(sides)
        assert logits.shape == (clips, 10)
        assert np.isfinite(logits).all() and np.isfinite(pooled).all()
    alone, both = (logits for _, (logits, _) in outputs)
    close(both[:1], alone)
    assert np.abs(both[0] - both[1]).max() > 0.01
