"""Token merging against a plain NumPy reading of ToMe, and inside the network."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxvit_jax.deploy.pretrained import forward
from fluxvit_jax.grids import Grid
from fluxvit_jax.models import blocks, fluxvit, token_merging
from tests.models import golden

GRID = Grid(8, 4, 4)  # that of golden.TINY: 128 tokens
BUDGET = 80
CLIPS = 3


def close(ours, expected, tolerance=1e-5):
    np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------
# How many tokens are merged where


def fewest_left(tokens: int, blocks: int) -> int:
    for _ in range(blocks):
        tokens -= tokens // 2
    return tokens


def test_schedules():
    """Over random cases: within a token of an even geometric sequence, never more than halved."""
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(3000):
        tokens, blocks = int(2 ** rng.uniform(0, 13)), int(rng.integers(1, 13))
        budget = int(tokens * 2 ** rng.uniform(-1.1 * blocks, 0)) + 1
        if fewest_left(tokens, blocks) > budget:
            refused += 1
            with pytest.raises(
                ValueError, match=f"{blocks} merging blocks .* {tokens} .* {budget}:"
            ):
                token_merging.schedule(tokens, budget, blocks)
            continue
        left = token_merging.schedule(tokens, budget, blocks)
        assert len(left) == blocks and left[-1] == min(budget, tokens)
        for before, after in zip((tokens, *left), left, strict=False):
            assert before - before // 2 <= after <= before
        if budget < tokens:
            even = tokens * (budget / tokens) ** (np.arange(1, blocks + 1) / blocks)
            assert np.abs(left - even).max() <= 1
    assert 50 < refused < 1000


def test_a_schedule_at_the_limit_of_halving():
    assert token_merging.schedule(1023, 1, 10) == (512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
    assert token_merging.schedule(1024, 1, 10) == (512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
    assert token_merging.schedule(128, 128, 3) == (128, 128, 128)
    with pytest.raises(ValueError, match="0 merging blocks"):
        token_merging.schedule(2, 1, 0)
    with pytest.raises(ValueError, match="budget of 0"):
        token_merging.schedule(2, 0, 4)


def test_how_many_blocks_merge():
    for depth in (1, 2, 3, 6, 12):
        for tokens in (1, 7, 128, 1728):
            for budget in (1, 2, 5, 32, 108, 432, 1024, 1728):
                if fewest_left(tokens, depth) > budget:
                    with pytest.raises(ValueError, match=f"{depth} merging blocks"):
                        token_merging.blocks_for(tokens, budget, depth)
                    continue
                blocks = token_merging.blocks_for(tokens, budget, depth)
                if tokens <= budget:
                    assert blocks == 0
                    continue
                assert token_merging.schedule(tokens, budget, blocks)[-1] == budget
                assert blocks <= depth and blocks >= min(4, depth)
                assert blocks == min(4, depth) or fewest_left(tokens, blocks - 1) > budget


# ---------------------------------------------------------------------------------------------
# One merging


def plain_merge(x, metric, size, keep):
    """ToMe for one clip, pair by pair in float64. x: [1 + N, C]; metric: [1 + N, D]; size: [1 + N].

    Returns the tokens and sizes, and for each token the rows of x that are in it.
    """
    x, metric = x.astype(np.float64), metric.astype(np.float64)
    A, B = range(2, len(x), 2), range(1, len(x), 2)

    def cosine(i, j):
        return metric[i] @ metric[j] / np.sqrt(metric[i] @ metric[i] * (metric[j] @ metric[j]))

    matches = []
    for i in A:
        best = max(B, key=lambda j, i=i: (cosine(i, j), -j))
        matches.append((-cosine(i, best), i, best))
    target = {i: best for _, i, best in sorted(matches)[: len(x) - 1 - keep]}
    members = [
        [row, *(i for i in A if target.get(i) == row)] for row in range(len(x)) if row not in target
    ]
    sizes = np.array([size[rows].sum() for rows in members])
    tokens = np.array([np.average(x[rows], axis=0, weights=size[rows]) for rows in members])
    return tokens, sizes, members


def metric_without_ties(rng, N):
    return rng.normal(size=(CLIPS, 1 + N, 8))


def metric_with_ties(rng, N):
    """Directions whose cosines are exact in float32 and few: most similarities are equal."""
    axes, corners = np.eye(4), 2 * np.array(np.meshgrid(*[[0, 1]] * 4)).reshape(4, -1).T - 1
    directions = np.concatenate([axes, -axes, corners])
    lengths = 2.0 ** rng.integers(-2, 3, (CLIPS, 1 + N, 1))
    return lengths * directions[rng.integers(0, len(directions), (CLIPS, 1 + N))]


def metric_all_equal(rng, N):
    """CLS is as like the others as these are."""
    return np.broadcast_to(rng.normal(size=8), (CLIPS, 1 + N, 8))


METRICS = (metric_without_ties, metric_with_ties, metric_all_equal)
merge = jax.jit(token_merging.merge_tokens, static_argnames="keep")


def make_tokens(rng, N: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens [CLIPS, 1 + N, 5] that stand for 1 to 5 patches each, CLS for one."""
    size = rng.integers(1, 6, (CLIPS, 1 + N)).astype(np.float32)
    size[:, 0] = 1
    return rng.normal(size=(CLIPS, 1 + N, 5)).astype(np.float32), size


@pytest.mark.parametrize("make_metric", METRICS)
@pytest.mark.parametrize(
    ("N", "keep"), [(2, 1), (3, 2), (16, 8), (16, 11), (17, 9), (17, 16), (64, 40), (64, 63)]
)
def test_merging_is_that_of_tome(make_metric, N, keep):
    rng = np.random.default_rng(N + keep)
    x, size = make_tokens(rng, N)
    metric = make_metric(rng, N).astype(np.float32)
    merged, sizes = merge(x, metric, size, keep)
    assert merged.shape == (CLIPS, 1 + keep, 5) and sizes.shape == (CLIPS, 1 + keep)
    for clip in range(CLIPS):
        tokens, expected_sizes, members = plain_merge(x[clip], metric[clip], size[clip], keep)
        assert len(members) == 1 + keep and members[0] == [0]
        np.testing.assert_array_equal(sizes[clip], expected_sizes)
        close(merged[clip], tokens, 1e-6)


def test_merging_over_and_over_loses_nothing():
    """Patches and their sum stay, from 64 tokens to one; CLS stays as it is, bit for bit."""
    rng = np.random.default_rng(0)
    x, size = make_tokens(rng, 64)
    total, patches = (x * size[..., None]).sum(1), size.sum(1)
    before = x
    for keep in token_merging.schedule(64, 1, 9):
        x, size = merge(x, rng.normal(size=(CLIPS, x.shape[1], 8)), size, keep)
        assert x.shape[1] == 1 + keep
        np.testing.assert_array_equal(size.sum(1), patches)
        np.testing.assert_array_equal(size[:, 0], 1)
        np.testing.assert_array_equal(x[:, 0], before[:, 0])
        close((x * size[..., None]).sum(1), total, 1e-4)


def test_merging_nothing_changes_nothing():
    x, size = make_tokens(np.random.default_rng(0), 9)
    merged, sizes = merge(x, x, size, 9)
    np.testing.assert_array_equal(merged, x)
    np.testing.assert_array_equal(sizes, size)


@pytest.mark.parametrize("keep", [4, 10])
def test_what_one_merging_cannot_leave(keep):
    x, size = make_tokens(np.random.default_rng(0), 9)
    with pytest.raises(ValueError, match=f"leaves 5 to 9 of 9 tokens, not {keep}"):
        token_merging.merge_tokens(x, x, size, keep)


# ---------------------------------------------------------------------------------------------
# Merged tokens in attention: as if each were there as often as it has patches


def repeated(rng, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [1, N, C], their sizes [1, N], and each of them as often as its size, [1, M, C]."""
    x = rng.normal(size=(1, 12, width)).astype(np.float32)
    size = rng.integers(1, 5, 12)
    return x, size[None].astype(np.float32), np.repeat(x, size, axis=1)


def test_a_block_attends_by_size():
    x, size, copies = repeated(np.random.default_rng(0), golden.TINY.width)
    block = blocks.unstack(golden.tiny_model().blocks, 0)
    first = np.cumsum(size[0].astype(int)) - size[0].astype(int)
    expected = block(copies, None, 0.0, None)[:, first]
    close(block(x, None, 0.0, None, size), expected)
    assert np.abs(block(x, None, 0.0, None) - expected).max() > 1e-3


def test_pooling_weights_by_size():
    x, size, copies = repeated(np.random.default_rng(0), golden.TINY.width)
    pool = blocks.unstack(golden.tiny_model().pool, 1)
    close(pool(x, None, size), pool(copies, None))
    assert np.abs(pool(x, None) - pool(copies, None)).max() > 1e-3


def test_the_bias_is_of_full_precision():
    """bfloat16 would take 1 to 1000 patches for 991."""
    assert blocks.size_bias(jnp.full((2, 3), 1000.0)).dtype == jnp.float32
    close(blocks.size_bias(jnp.full((2, 3), 1000.0)), np.full((2, 1, 1, 3), np.log(1000)), 1e-6)


# ---------------------------------------------------------------------------------------------
# In the network


def make_patches(seed: int = 0) -> np.ndarray:
    """Clips on GRID, normalised: [CLIPS, 128, 588]."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(CLIPS, GRID.tokens, fluxvit.PATCH_VALUES)).astype(np.float32)


@cache
def program(budget: int, **changes):
    """The compiled network: (params, patches) -> Answer."""
    graph = fluxvit.graphdef(replace(golden.TINY, **changes))
    return jax.jit(lambda params, x: fluxvit.from_params(graph, params).on_grid(x, GRID, budget, 1))


def answer(patches, budget: int, params=None, **changes):
    return jax.device_get(program(budget, **changes)(params or golden.tiny_params(), patches))


@pytest.mark.parametrize(("budget", "cls"), [(128, "outside"), (129, "inside"), (140, "inside")])
def test_a_budget_of_all_tokens_is_the_plain_network(budget, cls):
    plain, ours = (answer(make_patches(), budget, cls=cls, merge_blocks=n) for n in (0, 2))
    jax.tree.map(np.testing.assert_array_equal, plain, ours)


@pytest.mark.parametrize(("blocks", "cls"), [(1, "outside"), (3, "outside"), (2, "inside")])
def test_the_budget_is_kept_and_all_patches_are_looked_at(blocks, cls):
    found = answer(make_patches(), BUDGET, cls=cls, merge_blocks=blocks)
    assert found.tokens.shape == (CLIPS, BUDGET + (cls == "outside"), golden.TINY.width)
    assert found.logits.shape == (CLIPS, 10) and np.isfinite(found.logits).all()
    everything = np.broadcast_to(np.arange(GRID.tokens), (CLIPS, GRID.tokens))
    np.testing.assert_array_equal(found.kept.token_index, everything)
    assert found.kept.valid is None


def test_every_patch_is_in_one_token():
    model = golden.tiny_model(merge_blocks=2)
    limits, grid = golden.limits_of(GRID), jnp.asarray([GRID])
    tokens, size = jax.jit(lambda x: model.merge_tokens(x, grid, 40, limits))(make_patches())
    assert tokens.shape[:2] == size.shape == (CLIPS, 41)
    np.testing.assert_array_equal(size.sum(1), 1 + GRID.tokens)
    np.testing.assert_array_equal(size[:, 0], 1)
    assert np.min(size) == 1 and np.max(size) > 4  # more than two rounds of pairs


def test_a_block_merges_between_attention_and_mlp():
    """The network of one merging block by hand, with the plain reading of ToMe on its keys."""
    model = golden.tiny_model(merge_blocks=1)
    first, *others = (blocks.unstack(model.blocks, number) for number in range(3))
    pool = blocks.unstack(model.pool, 1)

    @jax.jit
    def attend(patches):
        places = np.broadcast_to(np.arange(GRID.tokens), patches.shape[:2])
        behind_cls = jnp.pad(patches, ((0, 0), (1, 0), (0, 0)))
        position = model.position(jnp.asarray([GRID]), places, golden.limits_of(GRID))
        x = model.embed(behind_cls, position)
        attention = first.attn
        attended, _ = attention(first.norm1(x), None)
        return x + first.ls1(attended), attention.k_norm(attention.qkv(first.norm1(x))[1])

    @jax.jit
    def finish(tokens, size):
        tokens = tokens + first.ls2(first.mlp(first.norm2(tokens)))
        for block in others:
            tokens = block(tokens, None, 0.0, None, size)
        return tokens, pool(tokens, None, size)

    x, keys = (np.asarray(array) for array in attend(make_patches()))
    metric = keys.reshape(CLIPS, -1, golden.TINY.heads, 16).mean(axis=2)
    ones = np.ones(1 + GRID.tokens)
    merged = [plain_merge(x[clip], metric[clip], ones, BUDGET) for clip in range(CLIPS)]
    tokens, size = (np.stack([one[k] for one in merged]).astype(np.float32) for k in (0, 1))
    tokens, pooled = finish(tokens, size)
    found = answer(make_patches(), BUDGET, merge_blocks=1)
    close(found.tokens, tokens, 1e-4)
    close(found.pooled, pooled, 1e-4)


@pytest.mark.parametrize(("copies", "blocks"), [(2, 1), (4, 2)])
def test_what_repeats_is_merged_without_loss(copies, blocks):
    """Without positions, patches that are there several times are the same tokens throughout.

    So the network's answer at a budget of the distinct ones is that of all, to rounding.
    """
    params = golden.tiny_params()
    table = np.full_like(params["pos_embed"], 0.25)
    params = params | {"pos_embed": np.concatenate([params["pos_embed"][:1], table[1:]])}
    different, budget = make_patches(), GRID.tokens // copies

    def both(patches):
        everything = answer(patches, GRID.tokens, params)
        merged = answer(patches, budget, params, merge_blocks=blocks)
        assert merged.tokens.shape[1] == 1 + budget
        return everything, merged

    everything, merged = both(np.repeat(different[:, :budget], copies, axis=1))
    close(merged.logits, everything.logits, 2e-5)
    close(merged.pooled, everything.pooled, 2e-5)
    everything, merged = both(different)  # where nothing repeats, something is lost
    assert np.abs(merged.logits - everything.logits).max() > 1e-3


def test_a_clip_does_not_depend_on_its_batch():
    patches, others = make_patches(), make_patches(seed=1)
    others[1] = patches[0]
    ours, theirs = (answer(x, BUDGET, merge_blocks=2) for x in (patches, others))
    for one, other in zip(ours[:3], theirs[:3], strict=True):
        np.testing.assert_array_equal(one[0], other[1])
        assert np.abs(one[0] - other[0]).max() > 0.01


def test_unrolled_blocks_are_the_same_network():
    looped, unrolled = (
        answer(make_patches(), BUDGET, merge_blocks=1, scan=scan) for scan in (True, False)
    )
    close(looped.logits, unrolled.logits)
    close(looped.tokens, unrolled.tokens)


def test_bfloat16():
    patches = jnp.asarray(make_patches(), jnp.bfloat16)
    found = answer(patches, BUDGET, merge_blocks=3, dtype="bfloat16")
    assert found.tokens.dtype == jnp.bfloat16 and found.logits.dtype == jnp.float32
    assert np.isfinite(found.tokens.astype(np.float32)).all()
    # Rounding makes other pairs the most alike, so the answer is only roughly that of float32.
    exact = answer(make_patches(), BUDGET, merge_blocks=3).logits
    assert np.abs(found.logits - exact).max() < 0.25 * np.abs(exact).max()


def test_one_program_for_all_clips():
    compiled = program(BUDGET, merge_blocks=2)
    first, second = (compiled(golden.tiny_params(), make_patches(seed)) for seed in (0, 1))
    assert compiled._cache_size() == 1
    assert np.abs(first.logits - second.logits).max() > 0.01


def test_what_callers_are_told_was_looked_at():
    """`pretrained.forward`, which the export is made of as well: from pixels, every patch."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (CLIPS, GRID.tokens, fluxvit.PATCH_VALUES)).astype(np.uint8)
    model = replace(golden.TINY, merge_blocks=2)
    found, kept = jax.jit(forward, static_argnames=("model", "grid", "budget", "head"))(
        golden.tiny_params(), pixels, model, GRID, 48, 1
    )
    assert found.tokens.shape[1] == 49 and kept.shape == (CLIPS, GRID.tokens) and kept.all()


def test_what_the_network_refuses():
    with pytest.raises(ValueError, match="4 of 3 blocks cannot merge"):
        answer(make_patches(), 100, merge_blocks=4)
    with pytest.raises(ValueError, match="1 merging blocks cannot bring 128 patches down to 63"):
        answer(make_patches(), 63, merge_blocks=1)
    with pytest.raises(ValueError, match="down to 63"):
        answer(make_patches(), 64, cls="inside", merge_blocks=1)
