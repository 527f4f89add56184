"""Candidates of a search: ways to run a network, the order they are tried in, and halving.

A candidate is a method, a budget, a grid and a head. "select" keeps the budget's tokens of a grid
that can fill it; "plain" runs a grid whose tokens all go through, "merge" merges a grid's tokens
down to the budget inside the network. Files and error messages call a candidate a cell.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ml_collections import ConfigDict

from fluxvit_jax.config.grids import search_grids
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import Grid, nearest_head
from fluxvit_jax.models import token_merging
from fluxvit_jax.models.fluxvit import FluxViTConfig

# A plain grid matches a budget of which it fills at least this share: the nearest grid below a
# budget is often a little smaller (512: 8 frames of 112 px fit, 4 of 140 px are 400).
PLAIN_FILL = 0.75
HALVINGS = 3  # of the candidates by successive halving; the last eighth sees all videos


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a network. budget: tokens that go through it, CLS among them if inside."""

    method: str
    budget: int
    grid: Grid
    head: int

    @property
    def program(self) -> str:
        """Key of the compiled program: candidates that differ only in the head share timings.

        A grid with exactly the budget's tokens runs alike whether or not they are selected.
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
        """The config of the network that runs it.

        Raises ValueError: the network has too few blocks to merge that many tokens.
        """
        if self.method != "merge":
            return model
        patch_budget = self.budget - (model.cls == "inside")
        blocks = token_merging.blocks_for(self.grid.tokens, patch_budget, model.depth)
        return replace(model, merge_blocks=blocks)

    def matches_budget(self, budget: int) -> bool:
        """Whether it is one of the ways to meet a budget."""
        if self.method == "plain":
            return PLAIN_FILL * budget <= self.budget <= budget
        return self.budget == budget


def candidates(config: ConfigDict, model: FluxViTConfig) -> list[Candidate]:
    """All candidates of a search, in an order that soon gives a rough picture of the whole.

    Raises UserError: the lattice of grids is empty, or a budget is above all of them.
    """
    grids = _coarse_to_fine(search_grids(config))
    budgets = sorted(set(config.search.budgets), reverse=True)
    listed = [
        candidate for grid in grids for candidate in _candidates_on(grid, budgets, config, model)
    ]
    for budget in budgets:
        if not any(candidate.matches_budget(budget) for candidate in listed):
            raise UserError(
                f"config.search.budgets: no grid can fill {budget} tokens; the largest of "
                f"search.frames x search.resolutions has {max(grid.tokens for grid in grids)}"
            )
    return listed


def _candidates_on(
    grid: Grid, budgets: Sequence[int], config: ConfigDict, model: FluxViTConfig
) -> list[Candidate]:
    all_tokens = grid.tokens + (model.cls == "inside")
    ways = []
    if model.selector != "none":
        ways += [("select", budget) for budget in budgets if budget <= all_tokens]
    if any(Candidate("plain", all_tokens, grid, 0).matches_budget(budget) for budget in budgets):
        ways.append(("plain", all_tokens))
    if config.search.merging:
        ways += [("merge", b) for b in budgets if b < all_tokens and _can_merge(grid, b, model)]
    return [
        Candidate(method, budget, grid, head)
        for method, budget in ways
        for head in _heads(budget, config)
    ]


def _can_merge(grid: Grid, budget: int, model: FluxViTConfig) -> bool:
    try:
        Candidate("merge", budget, grid, 0).network(model)
    except ValueError:  # too few blocks to merge that many tokens
        return False
    return True


def _heads(budget: int, config: ConfigDict) -> Sequence[int]:
    if config.search.heads == "all":
        return range(len(config.train.budgets))
    return [nearest_head(budget, config.train.budgets)]


def _coarse_to_fine(grids: Sequence[Grid]) -> list[Grid]:
    """The lattice's corners first, then repeatedly the grids halfway between earlier ones."""
    sides = [sorted({grid[axis] for grid in grids}) for axis in (0, 1)]
    levels = [dict(zip(side, _levels(len(side)), strict=True)) for side in sides]
    return sorted(grids, key=lambda grid: max(levels[0][grid.frames], levels[1][grid.rows]))


def _levels(count: int) -> list[int]:
    """How often 0..count-1 must be halved until each is an end: 0 for the two ends."""
    levels = [0] * count
    spans, level = [(0, count - 1)], 0
    while spans := [(low, high) for low, high in spans if high - low > 1]:
        level += 1
        halves = []
        for low, high in spans:
            middle = (low + high) // 2
            levels[middle] = level
            halves += [(low, middle), (middle, high)]
        spans = halves
    return levels


def stages(videos: int, batch: int, strategy: str) -> list[int]:
    """Numbers of videos after which the worse half is dropped; the last is all of them."""
    if strategy == "full":
        return [videos]
    shares = [videos / 2**halving for halving in range(HALVINGS, 0, -1)]
    batches = [min(videos, max(1, round(share / batch)) * batch) for share in shares]
    return sorted({*batches, videos})


def top_half(
    rivals: Sequence[Candidate], top1: Mapping[str, float], budgets: Sequence[int]
) -> list[Candidate]:
    """The more accurate half of the candidates of each method and budget, in their order."""

    def group(candidate: Candidate) -> tuple[str, list[int]]:
        return candidate.method, [b for b in budgets if candidate.matches_budget(b)]

    survivors = set()
    for _, grouped in itertools.groupby(sorted(rivals, key=group), group):
        ranked = sorted(grouped, key=lambda c: (-top1[c.name], c.grid.tokens, c.name))
        survivors |= {candidate.name for candidate in ranked[: (len(ranked) + 1) // 2]}
    return [candidate for candidate in rivals if candidate.name in survivors]
