"""Grids of a config: those it trains on, evaluates on and searches."""

import math

from ml_collections import ConfigDict

from fluxvit_jax.config.fields import numbers_of
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import Grid, square_grids


def admissible_grids(config: ConfigDict) -> tuple[Grid, ...]:
    """The grids that training draws from. Raises UserError if there are none."""
    frames = numbers_of("data.grids.frames", config.data.grids.frames)
    resolutions = numbers_of("data.grids.resolutions", config.data.grids.resolutions)
    min_tokens, max_tokens = config.data.grids.tokens
    try:
        return square_grids(frames, resolutions, min_tokens, max_tokens)
    except UserError as error:
        raise UserError(f"config.data.grids: {error}") from error


def image_grids(config: ConfigDict) -> tuple[Grid, ...]:
    """The grids that images are trained on, where they have steps of their own: one frame."""
    sides = sorted({grid.rows for grid in admissible_grids(config)})
    return tuple(Grid(1, side, side) for side in sides)


def evaluation_grids(config: ConfigDict) -> tuple[Grid, ...]:
    """The grid of each of `eval.settings`."""
    return tuple(Grid.square(*size) for _, *size in config.eval.settings)


def search_grids(config: ConfigDict) -> tuple[Grid, ...]:
    """All combinations of `search.frames` and `search.resolutions`.

    Raises UserError if there are none.
    """
    frames = numbers_of("search.frames", config.search.frames)
    resolutions = numbers_of("search.resolutions", config.search.resolutions)
    try:
        return square_grids(frames, resolutions, min_tokens=1, max_tokens=math.inf)
    except UserError as error:
        raise UserError(f"config.search: {error}") from error
