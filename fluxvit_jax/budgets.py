"""Grids and token budgets: which grids a config admits and how many tokens a budget keeps.

A grid is how a clip is cut into tokens: `frames` x `rows` x `columns` patches of 14 x 14 pixels.
A budget is how many of them the selector keeps. All is plain Python: the program uses it before
anything is compiled, and the tests as the reference for what runs on the device.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from fluxvit_jax.errors import UserError

PATCH = 14  # pixels along each side of a patch (paper, table of the network)


class Grid(NamedTuple):
    """Frames, patch rows and patch columns of a clip."""

    frames: int
    rows: int
    columns: int

    @classmethod
    def square(cls, frames: int, resolution: int) -> "Grid":
        """The grid of square frames of `resolution` pixels a side, a multiple of the patch size."""
        return cls(frames, resolution // PATCH, resolution // PATCH)

    def __str__(self) -> str:
        return f"{self.frames} frames x {self.rows * PATCH} x {self.columns * PATCH} px"

    @property
    def tokens(self) -> int:
        """Tokens of the grid, T * H * W."""
        return self.frames * self.rows * self.columns

    @property
    def resolution(self) -> int:
        """Pixels of a frame from top to bottom; of a square grid, along each side."""
        return self.rows * PATCH


def square_grids(
    frames: Sequence[int], resolutions: Sequence[int], min_tokens: int, max_tokens: int
) -> tuple[Grid, ...]:
    """The admissible grids, frames outermost, for square frames of `resolutions` pixels a side.

    A grid is admissible when `min_tokens <= grid.tokens <= max_tokens`, as in the official sampler
    (frames 6..24 step 2, resolutions 112..336 step 28, 2048..6144 tokens: 41 grids).

    Raises UserError when a resolution is no multiple of 14, a number of frames is below 1, or no
    grid is admissible.
    """
    for resolution in resolutions:
        if resolution < PATCH or resolution % PATCH:
            raise UserError(
                f"resolution {resolution} px is no multiple of the patch size {PATCH}; "
                f"the nearest is {max(1, round(resolution / PATCH)) * PATCH}"
            )
    if any(t < 1 for t in frames):
        raise UserError(f"a clip needs at least 1 frame, but grids of {min(frames)} are asked for")
    grids = [Grid.square(t, r) for t in frames for r in resolutions]
    admissible = tuple(grid for grid in grids if min_tokens <= grid.tokens <= max_tokens)
    if not admissible:
        counts = [grid.tokens for grid in grids]
        have = f"have {min(counts)} to {max(counts)}" if counts else "are none"
        raise UserError(
            f"no grid has between {min_tokens} and {max_tokens} tokens: the grids of these frames "
            f"and resolutions {have}; widen the limits or the ranges"
        )
    return admissible


def capacity(grids: Sequence[Grid]) -> int:
    """Patches that a clip on any of `grids` fits in: the padded length P."""
    return max(grid.tokens for grid in grids)


def bounds(grids: Sequence[Grid]) -> Grid:
    """The largest frames, rows and columns of `grids`, each for itself."""
    return Grid(*map(max, zip(*grids, strict=True)))


def group_sizes(frames: int) -> tuple[int, ...]:
    """Frames in each of the consecutive groups of the group-dynamic selector.

    Four groups where 4 divides the frames, else two (official rule), but never a group of a single
    frame beside others, which has no predecessor to be compared with (the official code fails on
    four frames for that reason); as near to equal as the frames allow.
    """
    groups = max(1, min(4 if frames % 4 == 0 else 2, frames // 2))
    starts = [group * frames // groups for group in range(groups + 1)]
    return tuple(stop - start for start, stop in itertools.pairwise(starts))


def kept_tokens(grid: Grid, budget: int, rounding: Literal["exact", "official"] = "exact") -> int:
    """Tokens that the group-dynamic selector keeps of `grid` under `budget`.

    "exact" keeps min(budget, grid.tokens). "official" drops a share of each group and truncates in
    float64 as the official code does, and may so keep up to four tokens fewer: 12 x 224 px at 1024
    keeps 1020.
    """
    if grid.tokens <= budget:
        return grid.tokens
    if rounding == "exact":
        return budget
    ratio, groups = 1 - budget / grid.tokens, len(group_sizes(grid.frames))
    return groups * int((1 - ratio) * (grid.tokens // groups))


def nearest_head(budget: int, head_budgets: Sequence[int]) -> int:
    """Index of the head trained at the budget nearest to `budget` in ratio; ties to the first."""
    return min(
        range(len(head_budgets)), key=lambda head: abs(math.log(budget / head_budgets[head]))
    )
