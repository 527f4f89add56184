"""Weights made to fit: fewer classes, another native grid, another dtype."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from fluxvit_jax.convert.weight_files import Pretrained
from fluxvit_jax.data.class_names import (
    DATASETS,
    PARTS_OF_K710,
    dataset_of,
    labels_in_k710,
    of_dataset,
)
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import Grid
from fluxvit_jax.models.position_embedding import resize_table

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def cut_classes(pretrained: Pretrained, classes: int) -> Pretrained:
    """The first `classes` of all classifiers; those of Kinetics-710 begin with Kinetics-400's.

    Raises UserError if there are fewer, or if they would be no data set's: Kinetics-600 and -700
    are not the first of Kinetics-710.
    """
    config = pretrained.config
    if classes > config.model.classes:
        raise UserError(
            f"the classifiers have {config.model.classes} classes, fewer than {classes}"
        )
    if dataset_of(config.class_names) == "k710":
        parts = {len(of_dataset(part)): part for part in PARTS_OF_K710}
        if classes == len(of_dataset("k400")):
            return cut_k710(pretrained, "k400")
        if classes in parts:
            part = parts[classes]
            raise UserError(
                f"{DATASETS[part]} is not the first {classes} classes of {DATASETS['k710']}; "
                f"name it: --classes={part}"
            )
    return _take_classes(pretrained, range(classes), config.class_names[:classes])


def cut_k710(pretrained: Pretrained, part: str) -> Pretrained:
    """Classifiers of Kinetics-710 cut to one of `PARTS_OF_K710`, by the official table.

    Raises UserError if they are of other classes, by number or by name.
    """
    config = pretrained.config
    named = config.class_names and dataset_of(config.class_names) != "k710"
    if named or config.model.classes != len(of_dataset("k710")):
        raise UserError(
            f"--classes={part}: the weights have {config.model.classes} classes"
            f"{' of other names' if named else ''}, and are not of {DATASETS['k710']}"
        )
    return _take_classes(pretrained, labels_in_k710(part), of_dataset(part))


def _take_classes(
    pretrained: Pretrained, labels: Sequence[int], names: tuple[str, ...]
) -> Pretrained:
    """The rows `labels` of all classifiers, as the classes `names`."""
    config, rows = pretrained.config, list(labels)
    state = {
        name: np.ascontiguousarray(tensor[rows]) if name.startswith("head.") else tensor
        for name, tensor in pretrained.state.items()
    }
    model = dataclasses.replace(config.model, classes=len(rows))
    config = dataclasses.replace(config, model=model, class_names=names)
    return pretrained._replace(state=state, config=config, evaluations=())


def resize_grid(pretrained: Pretrained, grid: Grid) -> Pretrained:
    """The position table on another native grid, linear in time and bicubic in space."""
    model = pretrained.config.model
    native = Grid(model.frames, model.rows, model.columns)
    table = pretrained.state["pos_embed"]
    state = pretrained.state | {"pos_embed": resize_positions(table[0], native, grid)[None]}
    model = dataclasses.replace(model, **grid._asdict())
    config = dataclasses.replace(pretrained.config, model=model)
    return pretrained._replace(state=state, config=config, evaluations=())


def resize_positions(table: np.ndarray, native: Grid, grid: Grid) -> np.ndarray:
    """A position table [1 + places of `native`, C] for `grid`; the first row, of CLS, stays.

    Computed in float32 with PyTorch's bicubic kernel; returned in the dtype of the table.
    """
    places = jnp.asarray(table[1:], jnp.float32).reshape(*native, -1)
    with jax.default_matmul_precision("highest"):
        resized = np.asarray(resize_table(places, jnp.asarray(grid, jnp.int32), grid))
    rows = resized.reshape(grid.tokens, -1).astype(table.dtype)
    return np.concatenate([table[:1], rows])


def cast(state: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """The tensors in one of `DTYPES`."""
    return {name: tensor.astype(DTYPES[dtype]) for name, tensor in state.items()}
