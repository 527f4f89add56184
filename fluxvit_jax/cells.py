"""The cells of a search: which ways to run a network there are, and in which order they are tried.

A cell is a method, a budget, a grid and a head. "select" keeps the budget's tokens of a grid that
can fill it; "plain" runs a grid whose tokens all go through, "merge" merges a grid's tokens down to
the budget inside the network.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ml_collections import ConfigDict

from fluxvit_jax.budgets import Grid, nearest_head
from fluxvit_jax.config import search_grids
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import merging
from fluxvit_jax.models.fluxvit import FluxViTConfig

# A grid without selection stands for a budget of which it fills at least this share: the nearest
# grid below a budget is often a little smaller (512: 8 frames of 112 px fit, 4 of 140 px are 400).
PLAIN_FILL = 0.75
HALVINGS = 3  # of the cells by successive halving; the last eighth sees all videos


class Cell(NamedTuple):
    """One way to run a network. budget: tokens that go through it, CLS among them if inside."""

    method: str
    budget: int
    grid: Grid
    head: int

    @property
    def program(self) -> str:
        """What it runs, but for the head, on which no cost depends.

        A grid that has just the budget's tokens runs alike whether or not they are selected.
        """
        kind = "merge" if self.method == "merge" else "keep"
        return f"{kind}-{self._size}"

    @property
    def name(self) -> str:
        """Such as "select-1024-12x168-h2"."""
        return f"{self.method}-{self._size}-h{self.head}"

    @property
    def _size(self) -> str:
        return f"{self.budget}-{self.grid.frames}x{self.grid.resolution}"

    def network(self, model: FluxViTConfig) -> FluxViTConfig:
        """The network that runs it."""
        if self.method != "merge":
            return model
        places = self.budget - (model.cls == "inside")
        blocks = merging.blocks_for(self.grid.tokens, places, model.depth)
        return replace(model, merge_blocks=blocks)

    def stands_for(self, budget: int) -> bool:
        """Whether it is one of the ways to meet a budget."""
        if self.method == "plain":
            return PLAIN_FILL * budget <= self.budget <= budget
        return self.budget == budget


def cells_of(config: ConfigDict, model: FluxViTConfig) -> list[Cell]:
    """All cells of a search, in an order that soon gives a rough picture of the whole.

    Raises UserError: the lattice of grids is empty, or a budget is above all of them.
    """
    grids = _coarse_to_fine(search_grids(config))
    budgets = sorted(set(config.search.budgets), reverse=True)
    cells = [cell for grid in grids for cell in _cells_on(grid, budgets, config, model)]
    for budget in budgets:
        if not any(cell.stands_for(budget) for cell in cells):
            raise UserError(
                f"config.search.budgets: no grid can fill {budget} tokens; the largest of "
                f"search.frames x search.resolutions has {max(grid.tokens for grid in grids)}"
            )
    return cells


def _cells_on(
    grid: Grid, budgets: Sequence[int], config: ConfigDict, model: FluxViTConfig
) -> list[Cell]:
    whole = grid.tokens + (model.cls == "inside")
    ways = []
    if model.selector != "none":
        ways += [("select", budget) for budget in budgets if budget <= whole]
    if any(Cell("plain", whole, grid, 0).stands_for(budget) for budget in budgets):
        ways.append(("plain", whole))
    if config.search.merging:
        ways += [("merge", b) for b in budgets if b < whole and _can_merge(grid, b, model)]
    return [
        Cell(method, budget, grid, head)
        for method, budget in ways
        for head in _heads(budget, config)
    ]


def _can_merge(grid: Grid, budget: int, model: FluxViTConfig) -> bool:
    try:
        return bool(Cell("merge", budget, grid, 0).network(model))
    except ValueError:  # too few blocks to merge so many tokens
        return False


def _heads(budget: int, config: ConfigDict) -> Sequence[int]:
    if config.search.heads == "all":
        return range(len(config.train.budgets))
    return [nearest_head(budget, config.train.budgets)]


def _coarse_to_fine(grids: Sequence[Grid]) -> list[Grid]:
    """Corners of the lattice first, then what halves the distance between those before."""
    sides = [sorted({grid[axis] for grid in grids}) for axis in (0, 1)]
    levels = [dict(zip(side, _levels(len(side)), strict=True)) for side in sides]
    return sorted(grids, key=lambda grid: max(levels[0][grid.frames], levels[1][grid.rows]))


def _levels(count: int) -> list[int]:
    """How often 0..count-1 must be halved until each is an end: 0 for the two ends."""
    levels = [0] * count
    spans, level = [(0, count - 1)], 0
    while spans := [(low, high) for low, high in spans if high - low > 1]:
        level += 1
        middles = [(low + high) // 2 for low, high in spans]
        for middle in middles:
            levels[middle] = level
        spans = [
            half
            for (low, high), middle in zip(spans, middles, strict=True)
            for half in ((low, middle), (middle, high))
        ]
    return levels


def stages(videos: int, batch: int, strategy: str) -> list[int]:
    """After how many videos the worse half of the cells is dropped; the last is all of them."""
    if strategy == "full":
        return [videos]
    shares = [videos / 2**halving for halving in range(HALVINGS, -1, -1)]
    whole = [min(videos, max(1, round(share / batch)) * batch) for share in shares]
    return sorted({*whole[:-1], videos})


def better_half(
    cells: Sequence[Cell], top1: Mapping[str, float], budgets: Sequence[int]
) -> list[Cell]:
    """The more accurate half of the cells of each method and budget, in their order."""

    def rivals(cell: Cell) -> tuple:
        return cell.method, [budget for budget in budgets if cell.stands_for(budget)]

    kept = set()
    for _, own in itertools.groupby(sorted(cells, key=rivals), rivals):
        ranked = sorted(own, key=lambda cell: (-top1[cell.name], cell.grid.tokens, cell.name))
        kept |= {cell.name for cell in ranked[: (len(ranked) + 1) // 2]}
    return [cell for cell in cells if cell.name in kept]
