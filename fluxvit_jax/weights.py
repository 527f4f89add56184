"""Trained weights as the start of another model: read, and made to fit.

Two things may differ between the weights and the model that starts from them: the classes, for
which the classifier starts afresh (and with it the projectors, where the weights are pre-trained
without classes), and the native grid, to which the position table is resized. Both are said;
anything else is refused.
"""

from typing import Any

import numpy as np

from fluxvit_jax import checkpoint
from fluxvit_jax.budgets import Grid
from fluxvit_jax.config import NO_CLASSES
from fluxvit_jax.convert import files
from fluxvit_jax.convert.adapt import resize_positions
from fluxvit_jax.models.fluxvit import FluxViTConfig

Tree = dict[str, Any]
# What a file of weights without a config does not tell; then taken from the model that uses it.
UNTOLD = ("heads", "pool_heads", "frames", "rows", "columns")


def load(path: str, config: FluxViTConfig) -> tuple[Tree, Grid]:
    """The parameters in `path` and the native grid of their position table.

    Args:
        path: of any form that `convert.files` reads: a workdir (its best step; the moving average
            where one was kept) or one of its steps, a folder, .safetensors, .pth.
        config: of the model that will use them.

    Returns:
        nested dict of float32 numpy arrays, and the grid.

    Raises:
        UserError: there are no such weights, or they are damaged or of another kind of model.
    """
    found = files.read(path, default={name: getattr(config, name) for name in UNTOLD})
    model = found.config.model
    return found.params(np.float32), Grid(model.frames, model.rows, model.columns)


def fit(
    params: Tree, grid: Grid, config: FluxViTConfig, fresh: Tree, source: str
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
    classes = params["heads"]["bias"].shape[-1]
    if classes == NO_CLASSES != config.classes:
        params |= {name: fresh[name] for name in ("heads", "align")}
        notes.append(
            f"{source}: pre-trained without labels; decoders are dropped, and a classifier for "
            f"{config.classes} classes and the align projectors start afresh"
        )
    elif classes != config.classes:
        params["heads"] = fresh["heads"]
        notes.append(
            f"{source}: its classifier is for {classes} classes; "
            f"a new one for {config.classes} starts afresh"
        )
    native = Grid(config.frames, config.rows, config.columns)
    if grid != native:
        params["pos_embed"] = resize_positions(params["pos_embed"], grid, native)
        notes.append(f"{source}: its position table is resized from {grid} to {native}")
    checkpoint.check_fit(params, fresh, source)
    return params, notes
