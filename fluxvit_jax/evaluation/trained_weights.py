"""Weights to evaluate, search or show, with their class names, checked against a config."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from fluxvit_jax.checkpoints import checkpointer
from fluxvit_jax.config.fields import ADDED, FIELDS, flatten
from fluxvit_jax.config.network import model_config
from fluxvit_jax.config.variants import NO_CLASSES
from fluxvit_jax.data.class_names import KnownNames
from fluxvit_jax.data.sources import Source
from fluxvit_jax.data.splits import (
    common_class_names,
    configured_class_names,
    configured_names,
    open_compared,
)
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import fluxvit
from fluxvit_jax.training import init_from
from fluxvit_jax.training.train_state import abstract_params


class Weights(NamedTuple):
    """Parameters as numpy arrays, their origin, and the config that they were trained with.

    trained: the config of a run's checkpoint, a nested dict; None for other weights.
    class_names: of the classifier; empty if unknown.
    """

    params: dict
    origin: str
    trained: dict | None
    class_names: tuple[str, ...] = ()


def load_weights(config: ConfigDict, workdir: epath.Path) -> Weights:
    """The best checkpoint of a workdir, or without one, the weights of `train.init_from`.

    Raises UserError: there are none, or they are of another network.
    """
    if (workdir / checkpointer.FOLDER).exists() or not config.train.init_from:
        step, params, trained, class_names, _ = checkpointer.restore(workdir)
        if trained["model"]["classes"] == NO_CLASSES:
            raise UserError(
                f"{step} is pre-trained and has no classifier; fine-tune from it first: "
                f"--config.train.init_from={workdir}"
            )
        _check_same_network(trained, config, step)
        # Converted weights have the dtype of their file.
        params = jax.tree.map(lambda x: np.asarray(x, np.float32), fluxvit.network_params(params))
        expected = abstract_params(with_classes(config, params))
        checkpointer.check_fit(params, fluxvit.network_params(expected), step)
        return Weights(params, str(step.relative_to(step.parents[1])), trained, class_names)
    path = config.train.init_from
    loaded = init_from.load(path, model_config(config))
    if loaded.multi_label and not config.train.multi_label:
        raise UserError(
            f"{path}: was trained with several labels a video; add --config.train.multi_label=True"
        )
    expected = abstract_params(with_classes(config, loaded.params))
    checkpointer.check_fit(loaded.params, expected, path)
    stated = config.data.class_names  # goes before names that are only assumed
    names = () if loaded.names_assumed and stated else loaded.class_names
    return Weights(loaded.params, path, None, names)


def weights_with_config(config: ConfigDict, folder: epath.Path) -> tuple[ConfigDict, Weights]:
    """The weights to evaluate, and the config with their number of classes.

    Raises UserError: no data, or as `load_weights`.
    """
    if not config.data.validation:
        raise UserError("no data to evaluate on: add --config.data.validation=LIST")
    loaded = load_weights(config, folder)
    return with_classes(config, loaded.params), loaded


def with_classes(config: ConfigDict, params: dict) -> ConfigDict:
    """The config with the `model.classes` of trained weights, where it is 0."""
    if config.model.classes:
        return config
    counted = config.copy_and_resolve_references()
    counted.model.classes = params["heads"]["bias"].shape[-1]
    return counted


def open_named(config: ConfigDict, field: str, weights: Weights) -> Source:
    """The videos of `config.FIELD`, whose names are looked up among those of the weights.

    Raises UserError: as `splits.open_compared`.
    """
    if weights.class_names:
        known: KnownNames | None = KnownNames(weights.class_names, weights.origin)
    else:
        known = configured_names(config)
    return open_compared(flatten(config)[field], field, config, known, weights.origin)


def check_class_names(
    config: ConfigDict, weights: Weights, sources: Mapping[str, Source | None]
) -> tuple[str, ...] | None:
    """The class names; None if they are unknown.

    Without names in the weights, the file `data.class_names` is used. Raises UserError if names of
    the weights and the lists of videos differ.

    sources: by the field of the config that names them; None: there is no such list.
    """
    known: dict[str, Sequence[str] | None] = {weights.origin: weights.class_names}
    if not weights.class_names:
        given = configured_class_names(config.data.class_names, config.model.classes)
        known["config.data.class_names"] = given
    fields = flatten(config)
    known |= {
        f"config.{field}={fields[field]}": source.class_names if source else None
        for field, source in sources.items()
    }
    return common_class_names(known)


def _check_same_network(trained: dict, config: ConfigDict, step: Any) -> None:
    """Raises UserError if a field differs that changes the answers but no tensor's shape."""
    sides = {name: FIELDS[name].default for name in ADDED} | flatten(trained), flatten(config)
    for name in ("model.variant", "model.gelu", "model.cls", "train.budgets", "train.multi_label"):
        before, now = (json.dumps(side.get(name)) for side in sides)
        if before != now:
            raise UserError(f"{step} was trained with config.{name}={before}, not {now}")
