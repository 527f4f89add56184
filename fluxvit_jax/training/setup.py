"""What a run has and knows before its first step, from its config and data."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fluxvit_jax.checkpoints.workdir import check_workdir
from fluxvit_jax.config.checks import validate_for_training
from fluxvit_jax.config.grids import admissible_grids, image_grids
from fluxvit_jax.data import splits
from fluxvit_jax.data.class_balance import balanced_weights, describe_balance, source_labels
from fluxvit_jax.data.group_reader import ClipData
from fluxvit_jax.data.mixture import Mixture
from fluxvit_jax.data.retrieval_set import RetrievalSet
from fluxvit_jax.data.sources import Source
from fluxvit_jax.distributed import storage
from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.hosts import raise_on_all_hosts
from fluxvit_jax.distributed.mesh import clip_shards, make_mesh, platform_of
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import retrieve
from fluxvit_jax.evaluation.unreadable import check_readable
from fluxvit_jax.grids import Grid
from fluxvit_jax.objectives.base import Objective, check_objective, objective_class
from fluxvit_jax.training.optimizer import learning_rates, make_optimizer
from fluxvit_jax.training.profiling import check_profile
from fluxvit_jax.training.train_state import abstract_params, check_params_divide
from fluxvit_jax.training.train_step import make_objective
from fluxvit_jax.training.wandb_run import check_wandb

Tree = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """Data of a run.

    pairs: the validation videos with their captions, where the objective learns from captions.
    clip_data: arrays beside the training videos, where the objective reads such.
    """

    training: Source
    validation: Source | None
    pairs: RetrievalSet | None
    clip_data: ClipData | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Numbers of steps of a run."""

    steps_per_epoch: int
    total: int
    evaluation_every: int

    def evaluates_at(self, step: int) -> bool:
        """Whether the model is evaluated after `step`: regularly, and at the end."""
        return step > 0 and (step % self.evaluation_every == 0 or step == self.total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A run before its first step.

    config: with the classes counted, where `model.classes` is 0.
    identity: of the data, see `splits.describe_data`; checkpoints hold it.
    balance: a line about the balance of the classes, or "".
    frozen: parameters of other networks, on the devices.
    image_grids: of steps that show images; () where none do. Such steps are a program of their own,
        since their clips are so much shorter.
    rates: learning rate of each step, float64 [schedule.total].
    """

    config: ConfigDict
    workdir: epath.Path
    data: RunData
    identity: Tree
    mesh: Mesh
    schedule: Schedule
    grids: tuple[Grid, ...]
    image_grids: tuple[Grid, ...]
    balance: str
    objective: Objective
    frozen: Tree
    optimizer: optax.GradientTransformation
    rates: np.ndarray


def set_up(config: ConfigDict, workdir: storage.PathLike, fresh: bool = False) -> Setup:
    """The run that `config` describes; nothing is written.

    fresh: whether the workdir may hold a run of another config.

    Raises UserError on all hosts for a config, data set or workdir that cannot be used on one.
    """
    folder = storage.path_of(workdir)
    with raise_on_all_hosts():
        validate_for_training(config)
        config = splits.count_classes(config)
        check_objective(config, training=True)
        check_profile(config, folder)
        check_wandb(config)
        if not fresh:
            check_workdir(folder, config)
        data = open_data(config)
        mesh = make_mesh(config)
        check_params_divide(config, mesh)
        check_batch_size(config, clip_shards(mesh))
        schedule = run_length(config, len(data.training))
        identity = splits.describe_data(config, data.training, data.validation)
        identity["frozen"] = objective_class(config).frozen_identity(config)
        class_weights, balance = class_balance(config, data.training)
    splits.check_same_videos(training=data.training, validation=data.validation)

    grids = admissible_grids(config)
    has_images = isinstance(data.training, Mixture) and data.training.image_share > 0
    if has_images and config.data.sampling_period_epochs:
        raise UserError(
            "config.data.sampling_period_epochs: steps of images come between those of videos and "
            "do not repeat with them; set it to 0, or train on videos alone"
        )
    of_images = image_grids(config) if has_images else ()
    objective = make_objective(config, grids, platform_of(mesh))
    return Setup(
        config=config,
        workdir=folder,
        data=data,
        identity=identity,
        mesh=mesh,
        schedule=schedule,
        grids=grids,
        image_grids=of_images,
        balance=balance,
        objective=objective.weighted(class_weights) if class_weights else objective,
        frozen=objective_class(config).load_frozen(config, mesh),
        optimizer=make_optimizer(config, schedule.total, abstract_params(config)),
        rates=learning_rates(config, schedule.total),
    )


def open_data(config: ConfigDict) -> RunData:
    """The videos that `config.data` names. Raises UserError if they cannot be used."""
    objective = objective_class(config)
    training = objective.open_training(config)
    clip_data = objective.open_clip_data(config, training)
    validation: Source | None = None
    pairs = None
    if config.data.validation:
        if objective.captioned:
            pairs = retrieve.read_pairs(config)
            validation = retrieve.source_of(pairs.videos)
        else:
            validation = objective.open_validation(config, training)
        check_readable(validation, config.data.validation, config)
    elif objective.labelled or objective.captioned:
        say("no config.data.validation: the model is not evaluated on the way")
    return RunData(training=training, validation=validation, pairs=pairs, clip_data=clip_data)


def run_length(config: ConfigDict, videos: int) -> Schedule:
    """The schedule for a number of videos. Raises UserError if they are less than a batch."""
    clips, batch_size = videos * config.data.repeated_aug, config.train.batch_size
    steps = clips // batch_size
    if not steps:
        raise UserError(
            f"config.train.batch_size: {batch_size} clips are more than an epoch of "
            f"{config.data.train} has, {clips}"
        )
    return Schedule(
        steps_per_epoch=steps,
        total=config.train.epochs * steps,
        evaluation_every=config.eval.every_epochs * steps,
    )


def class_balance(config: ConfigDict, training: Source) -> tuple[tuple[float, ...], str]:
    """The weight of each class in the loss, () for none, and a line about a balance of the classes.

    Raises UserError if a balance is asked for and the labels are not known.
    """
    classes = config.model.classes
    if config.data.sampling == "balanced":
        labels = source_labels(training, "data.sampling")
        about = describe_balance(labels, classes)
        return (), f"balanced sampling: every class is drawn equally often; {about}"
    if config.train.class_weights == "balanced":
        labels = source_labels(training, "train.class_weights")
        weights = balanced_weights(labels, classes)
        low, high = weights[labels].min(), weights[labels].max()
        about = describe_balance(labels, classes)
        line = f"balanced class weights from {low:.3g} to {high:.3g} in the loss; {about}"
        return tuple(weights.tolist()), line
    return (), ""


def check_batch_size(config: ConfigDict, shards: int) -> None:
    """Raises UserError unless each of `shards` gets whole groups in every part of a batch."""
    group, parts = config.data.clips_per_grid, config.train.grad_accum_steps
    size = config.train.batch_size
    unit = group * parts * shards
    if size % unit:
        raise UserError(
            f"config.train.batch_size: {size} clips do not split into groups of "
            f"data.clips_per_grid={group} on each of {shards} devices in each of "
            f"train.grad_accum_steps={parts} parts; the nearest that does is "
            f"{max(1, round(size / unit)) * unit}"
        )
