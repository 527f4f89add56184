"""Flexible sampling (paper): each group of training clips gets a random grid.

The admissible grids, pairs of a frame count and a resolution within limits on their tokens, come
from `grids.square_grids`.
"""

from collections.abc import Sequence

from fluxvit_jax.data.random_streams import GRID_STREAM, stream_rng
from fluxvit_jax.grids import Grid


def grid_of_group(grids: Sequence[Grid], seed: int, group_index: int) -> Grid:
    """The grid, drawn uniformly from `grids`, that group `group_index` of clips shares."""
    return grids[int(stream_rng(seed, group_index, GRID_STREAM).integers(len(grids)))]
