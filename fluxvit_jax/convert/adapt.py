"""Weights made to fit: fewer classes, another native grid, another dtype."""

import dataclasses
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from fluxvit_jax.budgets import Grid
from fluxvit_jax.convert.files import Pretrained
from fluxvit_jax.errors import UserError
from fluxvit_jax.models.positions import resize_table

Weights = TypeVar("Weights", bound=NamedTuple)  # with a `state`
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def cut_classes(pretrained: Pretrained, classes: int) -> Pretrained:
    """The first `classes` of all classifiers; those of Kinetics-710 begin with Kinetics-400's.

    Raises UserError if there are fewer.
    """
    config = pretrained.config
    if classes > config.model.classes:
        raise UserError(
            f"the classifiers have {config.model.classes} classes, fewer than {classes}"
        )
    state = {
        name: np.ascontiguousarray(tensor[:classes]) if name.startswith("head.") else tensor
        for name, tensor in pretrained.state.items()
    }
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, classes=classes),
        class_names=config.class_names[:classes],
    )
    return pretrained._replace(state=state, config=config)


def resize_grid(pretrained: Pretrained, grid: Grid) -> Pretrained:
    """The position table on another native grid, linear in time and bicubic in space."""
    model = pretrained.config.model
    native = Grid(model.frames, model.rows, model.columns)
    table = pretrained.state["pos_embed"]
    state = pretrained.state | {"pos_embed": resize_positions(table[0], native, grid)[None]}
    model = dataclasses.replace(model, **grid._asdict())
    config = dataclasses.replace(pretrained.config, model=model)
    return pretrained._replace(state=state, config=config)


def resize_positions(table: np.ndarray, native: Grid, grid: Grid) -> np.ndarray:
    """A position table [1 + places of `native`, C] for `grid`; the first row, of CLS, stays.

    Computed in float32 with PyTorch's bicubic kernel; returned in the dtype of the table.
    """
    places = jnp.asarray(table[1:], jnp.float32).reshape(*native, -1)
    with jax.default_matmul_precision("highest"):
        resized = resize_table(places, jnp.asarray(grid, jnp.int32), grid)
    resized = np.asarray(resized).reshape(grid.tokens, -1).astype(table.dtype)
    return np.concatenate([table[:1], resized])


def cast(pretrained: Weights, dtype: str) -> Weights:
    """All tensors in one of `DTYPES`; of a `Pretrained` or a teacher."""
    state = {name: tensor.astype(DTYPES[dtype]) for name, tensor in pretrained.state.items()}
    return pretrained._replace(state=state)
