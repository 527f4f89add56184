"""Grids and budgets against the official sampler and selector."""

import json
from pathlib import Path

import pytest

from fluxvit_jax import grids
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import Grid, bounds, capacity
from fluxvit_jax.models.token_selection import official_kept_table

GOLDEN = json.loads((Path(__file__).parent / "golden" / "optim_case.json").read_text())


def official_grids(case: dict) -> tuple[Grid, ...]:
    args = case["args"]
    names = ("range_frame_start", "range_frame_end", "range_frame_stride")
    frames = range(*(args[name] for name in names))
    resolutions = range(*(args[name.replace("frame", "res")] for name in names))
    return grids.square_grids(
        frames, resolutions, args["limit_min_token_num"], args["limit_token_num"]
    )


@pytest.mark.parametrize("name", ["sampler_defaults", "sampler_official_script"])
def test_grids_are_the_official_ones(name):
    case = GOLDEN[name]
    grids = official_grids(case)
    assert [[g.frames, g.rows * 14, g.tokens] for g in grids] == case["pairs_frames_res_tokens"]
    assert len(set(grids)) == case["count"]


def test_capacity_and_bounds():
    grids = official_grids(GOLDEN["sampler_official_script"])
    assert capacity(grids) == 6144
    assert bounds(grids) == Grid(24, 24, 24)


def test_official_rounding_is_the_selectors():
    """The one table that the device uses, for odd frames as well."""
    for budget in (5, 64, 300):
        table = official_kept_table(budget, 33 * 25)
        for frames in range(1, 34):
            grid = Grid(frames, 5, 5)
            groups = len(grids.group_sizes(frames))
            assert grids.kept_tokens(grid, budget, "official") == table[groups, grid.tokens]


def test_official_rounding():
    for frames, resolution, total, budget, groups, kept in GOLDEN["kept_tokens"]["rows"]:
        grid = Grid(frames, resolution // 14, resolution // 14)
        assert grid.tokens == total
        assert len(grids.group_sizes(frames)) == groups
        assert grids.kept_tokens(grid, budget, "official") == kept


def test_exact_budgets_over_the_whole_range():
    lost = 0
    for frames in range(2, 33):
        for side in range(8, 25):
            grid = Grid(frames, side, side)
            for budget in (128, 512, 1024, 1536, 2048, 3072, 4096):
                exact = grids.kept_tokens(grid, budget)
                assert exact == min(budget, frames * side * side)
                shortfall = exact - grids.kept_tokens(grid, budget, "official")
                assert 0 <= shortfall <= 4
                lost += shortfall
    assert lost > 0


@pytest.mark.parametrize(
    ("frames", "sizes"),
    [(1, (1,)), (2, (2,)), (3, (3,)), (4, (2, 2)), (5, (2, 3)), (6, (3, 3)), (8, (2, 2, 2, 2))],
)
def test_groups_have_a_predecessor_for_each_score(frames, sizes):
    assert grids.group_sizes(frames) == sizes


def test_bad_grids_are_user_errors():
    with pytest.raises(UserError, match=r"225 px is no multiple .* nearest is 224"):
        grids.square_grids([8], [224, 225], 1, 9999)
    with pytest.raises(UserError, match="have 1568 to 2048"):
        grids.square_grids([8], [196, 224], 3000, 4000)
    with pytest.raises(UserError, match="are none"):
        grids.square_grids([], [224], 1, 9999)
    with pytest.raises(UserError, match="at least 1 frame"):
        grids.square_grids([0], [224], 0, 9999)


@pytest.mark.parametrize(
    ("budget", "head"),
    [(6000, 0), (3072, 0), (2509, 0), (2508, 1), (2048, 1), (1449, 1), (1448, 2), (64, 2)],
)
def test_nearest_head_is_nearest_in_ratio(budget, head):
    assert grids.nearest_head(budget, (3072, 2048, 1024)) == head
