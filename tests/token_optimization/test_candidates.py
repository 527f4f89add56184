"""Which cells a search tries, in which order, and which of them it drops."""

import itertools

import numpy as np
import pytest

from fluxvit_jax.config.fields import default_config
from fluxvit_jax.config.network import model_config
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import Grid
from fluxvit_jax.token_optimization.candidates import (
    PLAIN_FILL,
    Candidate,
    candidates,
    stages,
    top_half,
)


def make_config(**changes):
    config = default_config("S")
    for name, value in changes.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return config


def all_cells(**changes) -> list[Candidate]:
    config = make_config(**changes)
    return candidates(config, model_config(config))


@pytest.mark.parametrize("cls", ["outside", "inside"])
def test_every_grid_that_can_fill_a_budget(cls):
    inside = cls == "inside"
    cells = all_cells(model__cls=cls)
    lattice = [
        Grid.square(T, side) for T, side in itertools.product(range(4, 33, 2), range(112, 337, 28))
    ]
    assert len(lattice) == 135
    for budget in (3072, 2048, 1024, 512):
        expected = {grid for grid in lattice if grid.tokens + inside >= budget}
        found = [c.grid for c in cells if (c.method, c.budget) == ("select", budget)]
        assert len(found) == len(expected) and set(found) == expected
    plain = [cell for cell in cells if cell.method == "plain"]
    assert {cell.grid for cell in plain} == {
        grid
        for grid in lattice
        if any(PLAIN_FILL * b <= grid.tokens + inside <= b for b in (3072, 2048, 1024, 512))
    }
    assert all(cell.budget == cell.grid.tokens + inside for cell in plain)
    assert len({cell.name for cell in cells}) == len(cells)
    # As in the paper, the head is the one trained at the nearest budget.
    heads = {cell.budget: cell.head for cell in cells if cell.method == "select"}
    assert heads == {3072: 0, 2048: 1, 1024: 2, 512: 2}


def test_every_head():
    one, every = all_cells(), all_cells(search__heads="all")
    assert len(every) == 3 * len(one)
    assert {cell.program for cell in every} == {cell.program for cell in one}
    single = all_cells(search__heads="all", train__budgets=(2048,))
    assert {cell.head for cell in single} == {0}  # only one was trained


def test_merging_where_the_blocks_can():
    cells = all_cells(search__merging=True)
    merging = [cell for cell in cells if cell.method == "merge"]
    assert {(c.budget, c.grid) for c in merging} == {
        (c.budget, c.grid) for c in cells if c.method == "select" and c.budget < c.grid.tokens
    }
    shallow = make_config(search__merging=True, model__variant="Ti")
    model = model_config(shallow)
    for cell in candidates(shallow, model):
        if cell.method == "merge":  # two blocks quarter at best
            assert cell.grid.tokens <= 4 * cell.budget
            assert cell.network(model).merge_blocks == 2
        else:
            assert cell.network(model) == model


def test_a_network_that_selects_nothing_has_plain_cells_only():
    assert {cell.method for cell in all_cells(model__selector__kind="none")} == {"plain"}


def test_the_order_is_coarse_to_fine():
    """Each prefix spreads over the lattice: the corners first, the middle next."""
    grids = list(dict.fromkeys(cell.grid for cell in all_cells(search__budgets=(64,))))
    frames = sorted({grid.frames for grid in grids})
    assert {(g.frames, g.resolution) for g in grids[:4]} == {
        (T, side) for T in (4, 32) for side in (112, 336)
    }
    middle = {4, 18, 32}, {112, 224, 336}
    assert {(g.frames, g.resolution) for g in grids[:9]} == set(itertools.product(*middle))
    quarter = [frames.index(grid.frames) for grid in grids[: len(grids) // 4]]
    assert max(np.diff(sorted(set(quarter)))) <= 4


def test_cells_of_a_grid_are_behind_one_another():
    """Its views are cut once."""
    runs = [grid for grid, _ in itertools.groupby(all_cells(), lambda cell: cell.grid)]
    assert len(runs) == len(set(runs)) == 134  # 4 frames of 112 px are too few for any budget


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search__frames": "8..4..2"}, r"config.search.frames: 8..4..2 is empty"),
        ({"search__resolutions": "100..200..28"}, "100 px is no multiple of the patch size 14"),
        ({"search__budgets": (99_999, 512)}, "no grid can fill 99999 tokens; the largest .* 18432"),
        (
            {"model__selector__kind": "none", "search__budgets": (1,)},
            "no grid can fill 1 tokens",
        ),
    ],
)
def test_no_cells(changes, message):
    with pytest.raises(UserError, match=message):
        all_cells(**changes)


@pytest.mark.parametrize("batch", [1, 7, 16, 5000])
@pytest.mark.parametrize("videos", [1, 2, 15, 240, 2000])
def test_stages_double_and_end_with_all_videos(videos, batch):
    assert stages(videos, batch, "full") == [videos]
    ends = stages(videos, batch, "halving")
    assert ends == sorted(set(ends)) and ends[-1] == videos and len(ends) <= 4
    assert all(end % batch == 0 for end in ends[:-1])
    if videos >= 16 * batch:
        assert ends == pytest.approx([videos / 8, videos / 4, videos / 2, videos], abs=batch)


def test_the_better_half_of_each_budget_stays():
    cells = all_cells(search__budgets=(1024, 512), search__merging=True)
    rng = np.random.default_rng(0)
    top1 = {cell.name: rng.integers(20) / 20 for cell in cells}  # with many ties
    kept = top_half(cells, top1, (1024, 512))
    assert [cell for cell in cells if cell in kept] == kept
    for method, budget in itertools.product(("select", "plain", "merge"), (1024, 512)):
        own = [c for c in cells if c.method == method and c.matches_budget(budget)]
        stay = [cell for cell in own if cell in kept]
        go = [cell for cell in own if cell not in kept]
        assert len(stay) == (len(own) + 1) // 2
        assert min(top1[c.name] for c in stay) >= max(top1[c.name] for c in go)
    assert top_half(cells[::-1], top1, (1024, 512)) == kept[::-1]
