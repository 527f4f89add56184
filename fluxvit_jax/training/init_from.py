"""Trained weights as initial values of another model.

Three differences between the weights and the model are accepted, and reported. For other classes,
by number or by name, the classifier starts afresh, and so do the projectors if the weights are
pre-trained without classes; but that of Kinetics-710 is cut to Kinetics-400, -600 or -700. For
another native grid the position table is resized. The GELU may be the other one. Any other
difference is an error.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fluxvit_jax.checkpoints import checkpointer
from fluxvit_jax.checkpoints.weights import read_weights
from fluxvit_jax.config.variants import HEADS, NO_CLASSES, VARIANTS
from fluxvit_jax.convert.adapt import resize_positions
from fluxvit_jax.data.class_names import (
    DATASETS,
    PARTS_OF_K710,
    dataset_of,
    labels_in_k710,
    of_dataset,
)
from fluxvit_jax.data.splits import common_class_names
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import Grid
from fluxvit_jax.models.fluxvit import FluxViTConfig

Tree = dict[str, Any]
# Fields that weights without a config do not determine; taken from the model that uses them.
UNKNOWN_FIELDS = ("heads", "pool_heads", "frames", "rows", "columns", "gelu")


class LoadedWeights(NamedTuple):
    """Trained weights before adaptation.

    params: nested dict of float32 numpy arrays; grid: the native grid of their position table;
    class_names: of their classifier; empty if unknown.
    names_assumed: whether only the form of the weights speaks for these names.
    multi_label: whether they say to be trained with `train.multi_label`.
    gelu: of their blocks; trained_heads: the first of their pooling heads that were trained.
    """

    params: Tree
    grid: Grid
    class_names: tuple[str, ...]
    names_assumed: bool = False
    multi_label: bool = False
    gelu: str = "tanh"
    trained_heads: int = HEADS


def load(path: str, config: FluxViTConfig) -> LoadedWeights:
    """The weights in `path`.

    Args:
        path: of any form that `convert.weight_files` reads: a workdir (its best step; the moving
            average if there is one) or one of its steps, a folder, .safetensors, .pth.
        config: of the model that will use them.

    Raises:
        UserError: there are no such weights, or they are damaged, of another size or of another
            kind of model.
    """
    default = {name: getattr(config, name) for name in UNKNOWN_FIELDS}
    weights = read_weights(path, default=default)
    model = weights.config.model
    _check_size(model, config, path)
    grid = Grid(model.frames, model.rows, model.columns)
    known = weights.config
    return LoadedWeights(
        weights.params(np.float32),
        grid,
        known.class_names,
        bool(known.assumed_names),
        known.multi_label,
        model.gelu,
        len(known.head_budgets),
    )


def _check_size(found: FluxViTConfig, wanted: FluxViTConfig, source: str) -> None:
    """Raises UserError for weights of another size, before the tensors that differ are known."""
    if (found.width, found.depth) != (wanted.width, wanted.depth):
        raise UserError(
            f"{source}: width {found.width}, depth {found.depth}{_variant(found, ' ({})')}; the "
            f"recipe is {_variant(wanted, '{}: ')}width {wanted.width}, depth {wanted.depth}"
        )


def _variant(model: FluxViTConfig, form: str) -> str:
    """The name of the variant of a model's size, formatted; "" for another size."""
    for name, variant in VARIANTS.items():
        if (variant.width, variant.depth) == (model.width, model.depth):
            return form.format(name)
    return ""


def fit(
    loaded: LoadedWeights,
    config: FluxViTConfig,
    fresh: Tree,
    source: str,
    class_names: Sequence[str] | None = None,
) -> tuple[Tree, list[str]]:
    """The parameters for the model of `config`, and a line for each adaptation.

    Args:
        fresh: parameters of the model as it would start without weights.
        source: origin of the weights, for messages.
        class_names: of the model's classes, if known.

    Raises:
        UserError: they do not fit, with the tensors that differ.
    """
    params, notes = dict(loaded.params), []
    classes = params["heads"]["bias"].shape[-1]
    if classes == NO_CLASSES != config.classes:
        params |= {name: fresh[name] for name in ("heads", "align")}
        notes.append(
            f"{source}: pre-trained without labels; decoders are dropped, and a classifier for "
            f"{config.classes} classes and the align projectors start afresh"
        )
    elif part := _part_of_k710(loaded.class_names, classes, class_names):
        rows = np.array(labels_in_k710(part))
        params["heads"] = {name: x[..., rows] for name, x in params["heads"].items()}
        notes.append(
            f"{source}: its classifier for {DATASETS['k710']} is cut to the {len(rows)} classes of "
            f"{DATASETS[part]}"
        )
    elif classes != config.classes:
        params["heads"] = fresh["heads"]
        notes.append(
            f"{source}: its classifier is for {classes} classes; "
            f"a new one for {config.classes} starts afresh"
        )
    elif difference := _difference(loaded.class_names, class_names):
        params["heads"] = fresh["heads"]
        notes.append(
            f"{source}: its classifier is for other classes ({difference}); a new one starts afresh"
        )
    native = Grid(config.frames, config.rows, config.columns)
    if loaded.grid != native:
        params["pos_embed"] = resize_positions(params["pos_embed"], loaded.grid, native)
        notes.append(f"{source}: its position table is resized from {loaded.grid} to {native}")
    if loaded.gelu != config.gelu:
        notes.append(f"{source}: trained with model.gelu={loaded.gelu}; goes on with {config.gelu}")
    checkpointer.check_fit(params, fresh, source)
    return params, notes


def _part_of_k710(before: Sequence[str], classes: int, now: Sequence[str] | None) -> str | None:
    """The part of Kinetics-710 that weights of it are fine-tuned on; None for other weights.

    before: names of the weights' `classes`; without any, 710 classes are taken for Kinetics', as
        the official code does.
    """
    if classes != len(of_dataset("k710")) or (before and dataset_of(before) != "k710"):
        return None
    dataset = dataset_of(now or ())
    return dataset if dataset in PARTS_OF_K710 else None


def _difference(before: Sequence[str], now: Sequence[str] | None) -> str:
    """The difference between two lists of class names, in words; "" if there is none."""
    try:
        common_class_names({"now": now, "before": before})
    except UserError as error:
        return str(error)
    return ""
