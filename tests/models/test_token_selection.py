"""The selector against a plain NumPy reading of the rule, one clip at a time."""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import Grid, bounds, capacity, group_sizes, kept_tokens, square_grids
from fluxvit_jax.models import token_selection
from fluxvit_jax.models.token_selection import GridLimits, Selection

ALL_BUDGETS = (128, 512, 1024, 1536, 2048, 3072, 4096)
WIDTH = 4
RELEASED = square_grids(range(6, 25, 2), range(112, 337, 28), 2048, 6144)
# One frame, too few for two groups, odd, one more than the groups divide, not square.
ODD = tuple(
    Grid(frames, rows, columns)
    for frames, sizes in {
        1: [(6, 5)], 2: [(4, 4)], 3: [(5, 4)], 4: [(4, 4)], 5: [(3, 7)], 6: [(1, 9)], 7: [(4, 4)],
        8: [(2, 9), (3, 3)], 9: [(4, 3)], 11: [(5, 2)], 12: [(4, 4)], 13: [(1, 1)], 16: [(2, 4)],
        17: [(3, 3)], 29: [(1, 5)],
    }.items()
    for rows, columns in sizes
)  # fmt: skip
PLACES = 200  # above the largest of ODD


# ---------------------------------------------------------------------------------------------
# The plain reading


def plain_groups(T: int, asked: int = 0) -> list[range]:
    """Consecutive groups of frames, as near to equal as T allows, none of a single frame."""
    count = asked or (4 if T % 4 == 0 else 1 if T == 2 else 2)
    while count > 1 and T / count < 2:
        count -= 1
    return [range(T * i // count, T * (i + 1) // count) for i in range(count)]


def plain_scores(tokens: np.ndarray, grid: Grid, groups: list[range], order: int) -> np.ndarray:
    """How far each token is from the one a frame before: float64 [T * H * W]."""
    frames = tokens[: grid.tokens].astype(np.float64).reshape(grid.frames, -1, tokens.shape[1])
    scores = np.zeros(frames.shape[:2])
    if grid.frames > 1:
        for group in groups:
            for t in group[1:]:
                scores[t] = np.linalg.norm(frames[t] - frames[t - 1], ord=order, axis=1)
            scores[group[0]] = scores[group[1]]
    return scores.ravel()


def plain_shares(sizes: list[int], budget: int) -> list[int]:
    """Webster's method: seat after seat to the group of the highest size / (2 seats + 1)."""
    seat = np.concatenate([(2 * np.arange(size) + 1) / size for size in sizes])
    group = np.repeat(np.arange(len(sizes)), sizes)
    return np.bincount(group[np.lexsort((group, seat))][:budget], minlength=len(sizes)).tolist()


class Plain:
    """The tokens of one clip in the order of keeping, group by group."""

    def __init__(self, scores: np.ndarray, grid: Grid, groups: list[range]):
        in_frame = grid.rows * grid.columns
        self.best_first = []
        for group in groups:
            members = np.arange(group.start * in_frame, group.stop * in_frame)
            self.best_first.append(members[np.lexsort((members, -scores[members]))])

    def kept(self, budget: int) -> np.ndarray:
        """The tokens of a budget, in token order."""
        shares = plain_shares([len(group) for group in self.best_first], budget)
        parts = [group[:n] for group, n in zip(self.best_first, shares, strict=True)]
        return np.sort(np.concatenate(parts))


def plain(tokens: np.ndarray, grid: Grid, groups: int = 0, order: int = 2) -> Plain:
    ranges = plain_groups(grid.frames, groups)
    return Plain(plain_scores(tokens, grid, ranges, order), grid, ranges)


# ---------------------------------------------------------------------------------------------
# Ours


def make_tokens(grids, places: int, seed: int = 0) -> np.ndarray:
    """Whole numbers, so that distances are exact and many are equal; what is past a grid is noise.

    float32 [B, P, C]. Every second clip has few values and most of its distances tie.
    """
    rng = np.random.default_rng(seed)
    spread = np.where((np.arange(len(grids)) + seed) % 2, 250, 2)[:, None, None]
    return rng.integers(-spread, spread, (len(grids), places, WIDTH)).astype(np.float32)


def limits_of(grids, fewest_tokens: int = 1) -> GridLimits:
    return GridLimits(*bounds(grids), fewest_tokens)


@cache
def program(budget: int, limits: GridLimits, options: tuple):
    """The compiled selector: (tokens, grid, key) -> Selection."""
    return jax.jit(
        lambda tokens, grid, key: token_selection.select(
            tokens, grid, budget, limits, key=key, **dict(options)
        )
    )


def select(tokens, grids, budget, key=None, **options) -> Selection:
    compiled = program(budget, limits_of(grids), tuple(options.items()))
    return jax.device_get(compiled(tokens, jnp.asarray(grids), key))


def kept_of(kept: Selection, clip: int) -> np.ndarray:
    """The kept tokens of one clip, in token order."""
    if kept.valid is None:
        return np.sort(kept.token_index[clip])
    return np.sort(kept.token_index[clip][kept.valid[clip]])


# ---------------------------------------------------------------------------------------------


def test_every_grid_and_budget():
    """2..32 frames x 112..336 px x 7 budgets, in one program: how many are kept, and which."""
    sides = range(112 // 14, 336 // 14 + 1)
    places, fewest = Grid(32, 24, 24).tokens, Grid(2, 8, 8).tokens
    order = program(places, GridLimits(32, 24, 24, fewest), ())
    for T in range(2, 33):
        grids = [Grid(T, side, side) for side in sides]
        tokens = make_tokens(grids, places, seed=T)
        everything = jax.device_get(order(tokens, jnp.asarray(grids), None))
        for clip, grid in enumerate(grids):
            expected = plain(tokens[clip], grid)
            for budget in ALL_BUDGETS:
                ours = kept_of(token_selection.take_prefix(everything, budget, fewest), clip)
                assert len(ours) == min(budget, grid.tokens)
                np.testing.assert_array_equal(ours, expected.kept(budget), f"{grid} at {budget}")
    assert order._cache_size() == 1


def test_one_program_for_all_grids_of_the_released_recipe():
    assert len(RELEASED) > 40
    places = capacity(RELEASED)
    limits = limits_of(RELEASED, min(grid.tokens for grid in RELEASED))
    programs = {budget: program(budget, limits, ()) for budget in (3072, 2048)}
    for number, grid in enumerate(RELEASED):
        tokens = make_tokens([grid], places, seed=number)
        expected = plain(tokens[0], grid)
        for budget, compiled in programs.items():
            kept = jax.device_get(compiled(tokens, jnp.asarray([grid]), None))
            # 2048 tokens are there in every grid, and then no mask is needed.
            assert (kept.valid is None) == (budget == 2048)
            np.testing.assert_array_equal(kept_of(kept, 0), expected.kept(budget))
    assert all(compiled._cache_size() == 1 for compiled in programs.values())


@pytest.mark.parametrize(
    ("kind", "groups"),
    [*(("group_dynamic", groups) for groups in (0, 1, 3, 8)), ("dynamic_l1", 0), ("dynamic_l2", 0)],
)
def test_odd_grids(kind, groups):
    tokens = make_tokens(ODD, PLACES)
    everything = select(tokens, ODD, PLACES, kind=kind, groups=groups)
    for clip, grid in enumerate(ODD):
        one_group = kind != "group_dynamic"
        order = 1 if kind == "dynamic_l1" else 2
        expected = plain(tokens[clip], grid, 1 if one_group else groups, order)
        for budget in range(1, grid.tokens + 2):
            ours = kept_of(token_selection.take_prefix(everything, budget, 1), clip)
            np.testing.assert_array_equal(ours, expected.kept(budget), f"{grid} at {budget}")


@pytest.mark.parametrize("kind", token_selection.SELECTORS)
def test_a_smaller_budget_is_a_prefix(kind):
    """For every selector, and with the masks that each budget has for itself."""
    tokens, key = make_tokens(ODD, PLACES), jax.random.key(1)
    large, small = (select(tokens, ODD, budget, kind=kind, key=key) for budget in (120, 40))
    np.testing.assert_array_equal(small.token_index, large.token_index[:, :40])
    np.testing.assert_array_equal(small.valid, large.valid[:, :40])
    for clip, grid in enumerate(ODD):
        for kept, budget in ((large, 120), (small, 40)):
            ours = kept_of(kept, clip)
            assert len(set(ours.tolist())) == len(ours) == min(budget, grid.tokens)
            assert ours.max() < grid.tokens


@pytest.mark.parametrize("kind", token_selection.SELECTORS)
def test_padding_does_not_matter(kind):
    tokens, key = make_tokens(ODD, PLACES), jax.random.key(1)
    other = make_tokens(ODD, PLACES, seed=9)
    for clip, grid in enumerate(ODD):
        other[clip, : grid.tokens] = tokens[clip, : grid.tokens]
    ours, theirs = (select(x, ODD, 40, kind=kind, key=key) for x in (tokens, other))
    for clip in range(len(ODD)):
        np.testing.assert_array_equal(kept_of(ours, clip), kept_of(theirs, clip))


def test_none_keeps_the_first_tokens():
    kept = select(make_tokens(ODD, PLACES), ODD, 40, kind="none")
    for clip, grid in enumerate(ODD):
        np.testing.assert_array_equal(kept_of(kept, clip), np.arange(min(40, grid.tokens)))


def test_tubes_are_whole():
    """A kept patch is kept in every frame; the last tube of a budget may end early."""
    kept = select(make_tokens(ODD, PLACES), ODD, 40, kind="tube", key=jax.random.key(3))
    for clip, (T, H, W) in enumerate(ODD):
        frames = np.zeros((T, H * W), bool)
        frames.flat[kept_of(kept, clip)] = True
        length = frames.sum(axis=0)
        whole, rest = divmod(min(40, T * H * W), T)
        assert (length == T).sum() == whole
        assert sorted(set(length.tolist()) - {0, T}) == [rest] * (rest > 0)
        assert (np.diff(frames.astype(int), axis=0) <= 0).all()  # an early end is an end


@pytest.mark.parametrize("kind", token_selection.NOISY_SELECTORS)
def test_drawn_selections_are_fair_and_follow_the_key(kind):
    grid, draws, budget = Grid(3, 4, 5), 400, 24
    grids = [grid] * draws
    kept = select(make_tokens(grids, 64), grids, budget, kind=kind, key=jax.random.key(0))
    assert len({tuple(kept_of(kept, clip)) for clip in range(draws)}) > draws / 2
    share, expected = (
        np.bincount(kept.token_index.ravel(), minlength=64) / draws,
        budget / grid.tokens,
    )
    deviation = (expected * (1 - expected) / draws) ** 0.5
    assert (abs(share[: grid.tokens] - expected) < 5 * deviation).all()
    assert not share[grid.tokens :].any()
    again, other = (
        select(make_tokens(grids, 64), grids, budget, kind=kind, key=jax.random.key(k))
        for k in (0, 1)
    )
    np.testing.assert_array_equal(kept.token_index, again.token_index)
    assert (kept.token_index != other.token_index).any()
    with pytest.raises(ValueError, match=f"{kind}.* needs a key"):
        select(make_tokens(grids, 64), grids, budget, kind=kind)


@pytest.mark.parametrize("kind", token_selection.NOISY_SELECTORS)
def test_a_key_for_each_clip_makes_it_independent_of_its_batch(kind):
    tokens, keys = make_tokens(ODD, PLACES), jax.random.split(jax.random.key(0), len(ODD))
    forwards = select(tokens, ODD, 40, kind=kind, key=keys)
    backwards = select(tokens[::-1], ODD[::-1], 40, kind=kind, key=keys[::-1])
    np.testing.assert_array_equal(forwards.token_index, backwards.token_index[::-1])
    np.testing.assert_array_equal(forwards.valid, backwards.valid[::-1])


def test_groups_are_those_of_the_budgets():
    for T in range(1, 65):
        starts = [group.start for group in plain_groups(T)]
        count = int(token_selection.num_groups(jnp.asarray(T)))
        ours = token_selection.group_start(np.arange(count), T, count)
        np.testing.assert_array_equal(ours, starts)
        assert tuple(len(group) for group in plain_groups(T)) == group_sizes(T)


def test_official_rounding():
    """The rows of the official code, and the Python reference wherever the official code works."""
    path = Path(__file__).parents[1] / "golden" / "optim_case.json"
    rows = np.array(json.loads(path.read_text())["kept_tokens"]["rows"])
    places = int(rows[:, 2].max())
    for budget in np.unique(rows[:, 3]).tolist():
        _, _, total, _, groups, kept = rows[rows[:, 3] == budget].T
        ours = token_selection.kept_tokens(total, groups, budget, places, "official")
        np.testing.assert_array_equal(ours, kept)
    grids = [Grid(T, side, side) for T in range(2, 33, 2) if T != 4 for side in range(8, 25)]
    total = np.array([grid.tokens for grid in grids])
    groups = np.array([len(group_sizes(grid.frames)) for grid in grids])
    for budget in ALL_BUDGETS:
        for rounding in ("exact", "official"):
            ours = token_selection.kept_tokens(total, groups, budget, int(total.max()), rounding)
            expected = [kept_tokens(grid, budget, rounding) for grid in grids]
            np.testing.assert_array_equal(ours, expected)


def test_official_rounding_takes_the_same_from_each_group():
    grids = [grid for grid in ODD if grid.frames % 2 == 0 and grid.frames > 4]
    tokens = make_tokens(grids, PLACES)
    kept = select(tokens, grids, 50, rounding="official")
    for clip, grid in enumerate(grids):
        count = kept_tokens(grid, 50, "official")
        expected = plain(tokens[clip], grid)
        np.testing.assert_array_equal(kept_of(kept, clip), expected.kept(count))
        member = kept_of(kept, clip) // (grid.tokens // len(expected.best_first))
        assert len(set(np.bincount(member).tolist())) == 1
    with pytest.raises(ValueError, match="only exact"):
        token_selection.take_prefix(kept, 10, 1, "official")


@pytest.mark.parametrize("grid", [Grid(12, 40, 60), Grid(12, 60, 65), Grid(16, 55, 74)])
def test_clips_of_many_patches(grid):
    """Frames of 720p have so many that the product of two of their numbers is no int32."""
    scores = np.random.default_rng(0).random(grid.tokens).astype(np.float32)
    own = Plain(scores, grid, plain_groups(grid.frames))
    shape = jnp.array([[grid.frames, grid.rows, grid.columns]], jnp.int32)
    groups = jnp.array([len(own.best_first)], jnp.int32)
    order = np.asarray(token_selection.ranking(jnp.asarray(scores)[None], shape, groups, 4)[0])
    for budget in (1, 256, 3072, grid.tokens):
        np.testing.assert_array_equal(np.sort(order[:budget]), own.kept(budget))


def test_more_patches_than_can_be_ranked_are_refused():
    most = token_selection.MOST_PATCHES
    scores = jax.ShapeDtypeStruct((1, most + 1), jnp.float32)
    with pytest.raises(UserError, match="a clip of 65536 patches: tokens are selected of at most"):
        jax.eval_shape(
            lambda scores: token_selection.ranking(
                scores, jnp.array([[4, 128, 128]]), jnp.array([2]), 4
            ),
            scores,
        )
