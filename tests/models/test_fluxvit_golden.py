"""Our network against numbers of the official PyTorch code."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.selection import (
    GridLimits,
    Selection,
    group_of_frame,
    kept_tokens,
    rule_groups,
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
    dropped[np.asarray(kept.index[clip])[np.asarray(kept.valid[clip])]] = False
    return dropped


@jax.jit
def every_head(patches, grid, index, valid):
    """All outputs of a batch in one program: logits, vectors and their two projections by head."""
    model, kept = golden.tiny_model(), Selection(index, valid)
    tokens = model.encode(fluxvit.take(patches, kept), grid, kept, LIMITS)
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
    order = golden.tiny_model().select(patches, grid, CAPACITY, LIMITS)
    total, groups = jnp.prod(grid, axis=1), rule_groups(grid[:, 0])
    kept = [
        kept_tokens(total[2 * n], groups[2 * n], budget_of(case), CAPACITY, "official")
        for n, case in enumerate(GOOD_CASES)
    ]
    valid = jnp.arange(CAPACITY) < jnp.repeat(jnp.stack(kept), 2)[:, None]
    return every_head(patches, grid, order.index, valid), Selection(order.index, valid)


def check_outputs(case, outputs, rows):
    logits, pooled, projected = outputs
    head, projector = case["kwargs"]["output_head"], case["kwargs"]["align_proj"]
    close(logits[head][rows], data(case["outputs"]["logits"])[:2])
    close(pooled[head][rows], data(case["outputs"]["x_final"])[:2])
    close(projected[head][projector][rows], data(case["outputs"]["projected"])[:2])


@pytest.mark.parametrize("number", range(len(GOOD_CASES)), ids=lambda n: GOOD_CASES[n]["id"])
def test_padded_in_a_batch_of_differing_grids(number):
    case = GOOD_CASES[number]
    outputs, kept = one_batch_of_all()
    check_outputs(case, outputs, slice(2 * number, 2 * number + 2))
    if "mask" in case["outputs"]:
        masks = [mask_of(kept, 2 * number + clip, case["total_tokens"]) for clip in range(2)]
        np.testing.assert_array_equal(masks, data(case["outputs"]["mask"])[:2])


@pytest.mark.parametrize("id", ["c00", "c15", "c25", "c32", "c44", "c51"])
def test_alone_without_padding(id):
    case = next(c for c in CASES if c["id"] == id)
    patches, grid = golden.batch(data(f"{case['video']}.x"))
    limits = golden.limits_of(tuple(grid[0].tolist()))
    kept = golden.tiny_model().select(patches, grid, budget_of(case), limits)
    valid = jnp.ones(kept.index.shape, bool) if kept.valid is None else kept.valid
    check_outputs(case, every_head(patches, grid, kept.index, valid), slice(0, 2))


@pytest.mark.parametrize("name", VIDEOS)
def test_patch_embedding(name):
    patches, _ = golden.batch(data(f"{name}.x")[:1])
    official = data(f"{name}.patch_embed")
    ours = golden.tiny_model().patch_embed(patches)[0].reshape(official.shape)
    close(ours, official)


@pytest.mark.parametrize("name", [n for n in VIDEOS if "importance" in VIDEOS[n]])
def test_importance(name):
    patches, grid = golden.batch(data(f"{name}.x"), CAPACITY)
    tokens = golden.tiny_model().patch_embed(patches)
    official = data(f"{name}.importance")
    scores = token_scores("group_dynamic", tokens, grid, rule_groups(grid[:, 0]), None)
    total = int(np.prod(grid[0]))
    # Both float32: the norm of a difference of nearly equal numbers keeps fewer digits.
    close(scores[:, :total].reshape(official.shape), official, 2e-5)


@pytest.mark.parametrize("name", VIDEOS)
def test_positions(name):
    grid = golden.patches_of(data(f"{name}.x"))[1]
    places = jnp.arange(int(np.prod(grid)))[None]
    model = golden.tiny_model()
    ours = model.position(jnp.asarray([grid]), places, LIMITS)
    official = data(f"{name}.pos_embed")
    if name in QUIRKS:
        assert np.abs(ours - official[:, 1:]).max() > 0.1
    else:
        close(ours, official[:, 1:])
        close(model.pos_embed[0], official[0, 0])


def test_quirks_are_right_here():
    """Where the official code adds a wrong grid's positions, ours are PyTorch's resize per axis.

    A clip of 1 x 4 patches of a table that varies along the columns alone equals the row of a
    square clip of 4 x 4 patches of the same table.
    """
    params = golden.tiny_params()
    columns = np.array(params["pos_embed"][1:]).reshape(8, 4, 4, -1)[:, :1]
    table = np.broadcast_to(columns, (8, 4, 4, 48)).reshape(-1, 48)
    table = np.concatenate([params["pos_embed"][:1], table])
    model = fluxvit.merge(
        fluxvit.structure(golden.TINY), params | {"pos_embed": jnp.asarray(table)}
    )
    square = model.position(jnp.asarray([(8, 4, 4)]), jnp.arange(128)[None], LIMITS)
    strip = model.position(jnp.asarray([(8, 1, 4)]), jnp.arange(32)[None], LIMITS)
    close(strip.reshape(8, 4, -1), square.reshape(8, 4, 4, -1)[:, 0])
    wide = model.position(jnp.asarray([(8, 2, 8)]), jnp.arange(128)[None], LIMITS)
    narrow = model.position(jnp.asarray([(8, 4, 8)]), jnp.arange(256)[None], LIMITS)
    close(wide.reshape(8, 2, 8, -1)[:, 0], narrow.reshape(8, 4, 8, -1)[:, 0])


@pytest.mark.parametrize("case", [c for c in CASES if "trace" in c], ids=lambda c: c["id"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_traces(case, depth):
    """The tokens after each block; ours are in another order, so they are put in theirs."""
    patches, grid = golden.batch(data(f"{case['video']}.x"))
    limits = golden.limits_of(tuple(grid[0].tolist()))
    params = golden.tiny_params()
    shallow = params | {"blocks": jax.tree.map(lambda leaf: leaf[:depth], params["blocks"])}
    model = fluxvit.merge(fluxvit.structure(replace(golden.TINY, depth=depth)), shallow)
    kept = model.select(patches, grid, case["budget"], limits)
    tokens = np.asarray(model.encode(fluxvit.take(patches, kept), grid, kept, limits))
    official = data(case["trace"][f"block{depth - 1}"])
    order = np.asarray(kept.index).argsort(axis=1)[..., None]
    close(tokens[:, 0], official[:, 0])
    close(np.take_along_axis(tokens[:, 1:], order, axis=1), official[:, 1:])


@pytest.mark.parametrize("T", range(1, 33))
def test_groups_of_frames(T):
    groups = int(rule_groups(jnp.asarray(T)))
    expected = 4 if T % 4 == 0 else 2
    assert groups == max(1, min(expected, T // 2))
    member = np.asarray(group_of_frame(jnp.arange(T), T, groups))
    sizes = np.bincount(member)
    assert len(sizes) == groups and (np.diff(member) >= 0).all()
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(
    "B,T,h,w", [(1, 8, 4, 4), (2, 4, 4, 4), (2, 5, 4, 4), (2, 1, 4, 4), (2, 8, 2, 4)]
)
def test_what_the_official_code_refuses(B, T, h, w):
    """Batch 1, four frames, odd frames, one frame and sides whose product is no square."""
    rng = np.random.default_rng(0)
    patches = jnp.asarray(rng.normal(size=(B, T * h * w, 588)), jnp.float32)
    grid = jnp.tile(jnp.asarray((T, h, w)), (B, 1))
    budget = T * h * w // 2
    model = golden.tiny_model(rounding="exact")
    limits = golden.limits_of((T, h, w))
    kept = model.select(patches, grid, budget, limits)
    assert kept.valid is None and kept.index.shape == (B, budget)
    assert all(len(set(row.tolist())) == budget for row in np.asarray(kept.index))
    logits, pooled = model(patches, grid, budget, 2, limits)
    assert logits.shape == (B, 10) and np.isfinite(logits).all() and np.isfinite(pooled).all()
    both = model(jnp.repeat(patches[:1], 2, 0), jnp.repeat(grid[:1], 2, 0), budget, 2, limits)[0]
    close(both[1], logits[0])
