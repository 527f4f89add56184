"""Trained weights as the start of another model: read, and made to fit.

Two things may differ between the weights and the model that starts from them: the classes, for
which the classifier starts afresh, and the native grid, to which the position table is resized.
Both are said; anything else is refused.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from fluxvit_jax import checkpoint
from fluxvit_jax.budgets import PATCH, Grid
from fluxvit_jax.config import VARIANTS
from fluxvit_jax.convert import names
from fluxvit_jax.errors import UserError
from fluxvit_jax.models.fluxvit import FluxViTConfig
from fluxvit_jax.models.positions import resize_table

Tree = dict[str, Any]


def load(path: str, config: FluxViTConfig) -> tuple[Tree, Grid | None]:
    """The parameters in `path` and the native grid of their position table, if that is known.

    Args:
        path: a workdir (its best step; the moving average where one was kept), the folder of one
            of its steps, or a .safetensors file with the official names.
        config: of the model that will use them; its heads split the file's attention weights.

    Returns:
        nested dict of float32 numpy arrays, and the grid.

    Raises:
        UserError: there are no such weights, or they are damaged or of another kind of model.
    """
    source = Path(path)
    if source.is_dir():
        params = checkpoint.restore_params(path)
        model = checkpoint.restore_config(path).get("model", {})
        side = model.get("resolution", 0) // PATCH
        grid = Grid(model["frames"], side, side) if side else None
    elif source.suffix == ".safetensors":
        params = _read_safetensors(source, config.heads)
        grid = _released_grid(params)
    elif not source.exists():
        raise UserError(f"{path}: there are no weights: no such file or folder")
    else:
        raise UserError(
            f"{path}: is neither a workdir nor .safetensors; other files must be converted first"
        )
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params), grid


def fit(
    params: Tree, grid: Grid | None, config: FluxViTConfig, fresh: Tree, source: str
) -> tuple[Tree, list[str]]:
    """The parameters for the model of `config`, and a line for each thing that was changed.

    Args:
        params, grid: as `load` returns them.
        fresh: parameters of the model as it would start without weights.
        source: where `params` are from, for messages.

    Raises:
        UserError: they don't fit, with the tensors that differ.
    """
    params, notes = dict(params), []
    classes = _shape(params, "heads", "kernel")[-1:]
    if classes and classes != (config.classes,):
        params["heads"] = fresh["heads"]
        notes.append(
            f"{source}: its classifier is for {classes[0]} classes; "
            f"a new one for {config.classes} starts afresh"
        )
    native = Grid(config.frames, config.rows, config.columns)
    places = _shape(params, "pos_embed")[:1]
    if grid and grid != native and places == (1 + grid.tokens,):
        params["pos_embed"] = _resized(params["pos_embed"], grid, native)
        notes.append(f"{source}: its position table is resized from {grid} to {native}")
    checkpoint.check_fit(params, fresh, source)
    return params, notes


def _read_safetensors(path: Path, heads: int) -> Tree:
    try:
        state = safetensors.numpy.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as .safetensors: {error}") from error
    try:
        return names.from_official(state, heads)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _released_grid(params: Tree) -> Grid | None:
    """The native grid of official weights, by their size."""
    places, width = params["pos_embed"].shape
    for variant in VARIANTS.values():
        side = variant.resolution // PATCH
        grid = Grid(variant.frames, side, side)
        if (variant.width, grid.tokens) == (width, places - 1):
            return grid
    return None


def _resized(table: np.ndarray, grid: Grid, native: Grid) -> np.ndarray:
    """A position table [1 + places of grid, C] for `native`; the first row, of CLS, stays."""
    places = table[1:].reshape(*grid, -1)
    resized = resize_table(jnp.asarray(places), jnp.asarray(native, jnp.int32), native)
    return np.concatenate([table[:1], np.asarray(resized).reshape(native.tokens, -1)])


def _shape(params: Tree, *path: str) -> tuple[int, ...]:
    """The shape of a tensor, () where it is missing."""
    for name in path:
        params = params.get(name, {}) if isinstance(params, dict) else {}
    return getattr(params, "shape", ())
