"""The grids of groups: uniform, and independent of the samples."""

import numpy as np

from fluxvit_jax.data.grid_sampling import grid_of_group
from fluxvit_jax.data.random_streams import stream_rng
from fluxvit_jax.grids import square_grids


def test_grids_are_drawn_uniformly_by_group_alone():
    grids = square_grids(range(6, 26, 2), range(112, 364, 28), 2048, 6144)
    drawn = [grid_of_group(grids, 3, group) for group in range(41 * 60)]
    assert drawn[17] == grid_of_group(grids, 3, 17)
    counts = np.array([drawn.count(grid) for grid in grids])
    # Chi squared over 40 degrees of freedom; 80 is past the 99.98th percentile.
    assert ((counts - 60) ** 2 / 60).sum() < 80
    assert drawn[:100] != [grid_of_group(grids, 4, group) for group in range(100)]


def test_a_groups_grid_tells_nothing_of_the_sample_of_its_number():
    grids = square_grids(range(6, 26, 2), range(112, 364, 28), 2048, 6144)
    alike = 0
    for number in range(500):
        drawn = stream_rng(3, number).integers(len(grids))
        alike += grid_of_group(grids, 3, number) == grids[drawn]
    assert alike < 40  # 12 by chance
