"""Grids and token budgets: which grids a config admits and how many tokens a budget keeps.

A grid is how a clip is cut into tokens: `frames` x `rows` x `columns` patches of 14 x 14 pixels.
A budget is how many of them the selector keeps. This is plain Python: the program uses it before
anything is compiled, and tests use it as the reference for what runs on the device.
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
        """Height of a frame in pixels; for a square grid also its width."""
        return self.rows * PATCH


def square_grids(
    frames: Sequence[int], resolutions: Sequence[int], min_tokens: int, max_tokens: float
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
    """The padded length P: patches of the largest of `grids`."""
    return max(grid.tokens for grid in grids)


def bounds(grids: Sequence[Grid]) -> Grid:
    """The largest number of frames, of rows and of columns among `grids`."""
    return Grid(*map(max, zip(*grids, strict=True)))


def group_sizes(frames: int) -> tuple[int, ...]:
    """Frames in each of the consecutive groups of the group-dynamic selector.

    Four groups if 4 divides the number of frames, else two (official rule), but never a group of a
    single frame next to other groups: such a frame has no predecessor to be compared with (the
    official code fails on four frames for that reason). Groups are as equal as possible.
    """
    groups = max(1, min(4 if frames % 4 == 0 else 2, frames // 2))
    starts = [group * frames // groups for group in range(groups + 1)]
    return tuple(stop - start for start, stop in itertools.pairwise(starts))


def kept_tokens(grid: Grid, budget: int, rounding: Literal["exact", "official"] = "exact") -> int:
    """Tokens that the group-dynamic selector keeps of `grid` under `budget`.

    "exact" keeps min(budget, grid.tokens). "official" drops a share of each group and truncates in
    float64 as the official code does, which may keep up to four tokens fewer: 12 x 224 px at 1024
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
