"""The interface of a training objective, the registry, and the loop over token budgets.

A new objective is a file with a subclass of `Objective` under `@register("NAME")`, chosen by
`config.train.objective`. One in this package is found by the name of its file. One outside is
registered by importing it, for example in the recipe that trains it.
"""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from fluxvit_jax.checkpoints import checkpointer
from fluxvit_jax.config.fields import OLD_OBJECTIVES
from fluxvit_jax.config.variants import NO_CLASSES, VARIANTS
from fluxvit_jax.data.captions import TextArrays, clip_texts
from fluxvit_jax.data.group_reader import ClipData
from fluxvit_jax.data.pipeline import training_source
from fluxvit_jax.data.sources import Source
from fluxvit_jax.data.splits import open_validation
from fluxvit_jax.distributed import storage
from fluxvit_jax.distributed.partition_rules import Rules
from fluxvit_jax.errors import UserError
from fluxvit_jax.models.arrays import zeros_of
from fluxvit_jax.models.sharding_constraints import ambient_mesh
from fluxvit_jax.models.token_selection import GridLimits

Tree = dict[str, Any]
Fields = dict[str, tuple[tuple[int, ...], str]]  # name -> shape and dtype for one clip


class Measure(NamedTuple):
    """What ranks the checkpoints of a run.

    start: of the names of its metrics, which end in a budget; word: for people; validation: which
    of those in `training.validation` gives it; falls: whether less is better, as of a loss, which
    is no share.
    """

    start: str
    word: str
    validation: Literal["accuracy", "retrieval", "answer_loss"] = "accuracy"
    falls: bool = False


FROZEN_SCOPE = "frozen"  # `jax.named_scope` of networks that are run without a backward pass


class Objective:
    """The loss of a training step, and what a run needs to know about it.

    The class has what follows from the config alone; an instance computes gradients.

    Attributes:
        labelled: whether clips have labels, and a classifier is trained that can be evaluated.
            Otherwise the videos come from a mixture of sources (`data.mixture`).
        whole_batch: whether the loss compares clips of the whole batch, as contrastive losses do.
            If so, a step calls it once with all clips and XLA partitions it. Otherwise the loss is
            a mean over clips, and a step may call it for each part of a batch and average.
        captioned: whether the training lists have captions: see `pipeline.train_batches`.
        training_data: what `data.train` may name, for people.
        task: what `--mode=evaluate` measures unless it is told: see `eval.task`.
        pools: whether the loss is of clip vectors, of which each budget has a pooling head.
        freezes: whether `train.freeze` can freeze a part of the network.
        takes_multi_label: whether it can train on multi-hot labels (`train.multi_label`).
        partition_rules: sharding of the parameters that the objective adds and of frozen ones; see
            `partition_rules.RULES`. They take precedence over the network's rules.
    """

    labelled: ClassVar[bool] = True
    whole_batch: ClassVar[bool] = False
    captioned: ClassVar[bool] = False
    training_data: ClassVar[str] = (
        "a list of path,label (train.csv, val.csv) or class folders (train/, val/)"
    )
    task: ClassVar[str] = "accuracy"
    pools: ClassVar[bool] = True
    freezes: ClassVar[bool] = False
    takes_multi_label: ClassVar[bool] = False
    partition_rules: ClassVar[Rules] = ()

    @classmethod
    def from_config(cls, config: ConfigDict, limits: GridLimits, platform: str) -> "Objective":
        """The objective for clips on grids within `limits`.

        platform: "cpu", "gpu" or "tpu".
        """
        raise NotImplementedError

    def value_and_grad(self, params: Tree, frozen: Tree, batch: Tree) -> tuple[Tree, Tree]:
        """Gradients, float32 and like `params`, and metrics, float32 scalars including "loss".

        params: the network's, from `fluxvit.prepare_params`, and those of `init_params`; frozen:
        those of `load_frozen`, and the part of the network that `train.freeze` freezes, which
        `fluxvit.with_frozen` puts together with `params`; batch: patches uint8 [B, P, 588], grid
        int32 [B, 3], label int32 [B], or with `train.multi_label` multi-hot uint8 [B, classes], key
        [B], one PRNG key per clip, and the arrays of `clip_fields`. All randomness of a clip
        derives from its key, so results do not depend on sharding or accumulation.
        """
        raise NotImplementedError

    def turns(self) -> "dict[str, Objective]":
        """Objectives of which each step takes another one, in this order, by names for people.

        Most have a single one, itself.
        """
        return {"": self}

    @classmethod
    def step_budgets(cls, config: ConfigDict) -> tuple[int, ...]:
        """The budgets that one step trains; where steps differ, those of the largest step."""
        return tuple(config.train.budgets)

    def weighted(self, class_weights: Sequence[float]) -> "Objective":
        """The objective with weighted classes in the loss (`train.class_weights`).

        Raises UserError if it weights none.
        """
        raise UserError(
            f"config.train.class_weights: {type(self).__name__} weights no classes; set it to none"
        )

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        """Raises UserError if the objective does not support the config."""

    @classmethod
    def check_for_training(cls, config: ConfigDict) -> None:
        """Raises UserError if something that only a training run needs is missing."""

    @classmethod
    def init_params(cls, config: ConfigDict, key: jax.Array) -> Tree:
        """Trained parameters that the objective adds to the network's, under other names."""
        return {}

    @classmethod
    def load_initial(cls, config: ConfigDict) -> Tree:
        """Trained weights for some of `init_params`, as numpy arrays. Raises UserError."""
        return {}

    def constrained(self, params: Tree) -> Tree:
        """Trained parameters after a step, each moved back to where it may be."""
        return params

    @classmethod
    def abstract_frozen(cls, config: ConfigDict, mesh: Mesh | AbstractMesh) -> Tree:
        """Shapes and shardings of the parameters that are not trained."""
        return {}

    @classmethod
    def load_frozen(cls, config: ConfigDict, mesh: Mesh) -> Tree:
        """The parameters that are not trained, on the mesh. Raises UserError if invalid."""
        return {}

    @classmethod
    def frozen_identity(cls, config: ConfigDict) -> dict[str, str]:
        """Checksums, by name, of the weights of `load_frozen`; checkpoints keep them instead."""
        return {}

    @classmethod
    def head_sizes(cls, config: ConfigDict) -> set[int]:
        """Channels of an attention head, of every network that the objective runs."""
        variant = VARIANTS[config.model.variant]
        return {variant.width // variant.heads}

    @classmethod
    def clip_fields(cls, config: ConfigDict) -> Fields:
        """Additional arrays of a batch, besides patches, grid and label."""
        return {}

    @classmethod
    def open_training(cls, config: ConfigDict) -> Source:
        """The training videos that `config.data` names. Raises UserError if they cannot be used."""
        return training_source(config, cls.labelled, cls.captioned)

    @classmethod
    def text_arrays(cls, config: ConfigDict) -> TextArrays:
        """What makes arrays of the captions or conversations of the training videos."""
        return clip_texts

    @classmethod
    def open_clip_data(cls, config: ConfigDict, source: Source) -> ClipData | None:
        """The source of the arrays of `clip_fields` for the videos of `source`."""
        return None

    @classmethod
    def open_validation(cls, config: ConfigDict, training: Source) -> Source:
        """The videos that `data.validation` names. Raises UserError if they cannot be used."""
        return open_validation(config, training)

    @classmethod
    def measure(cls, config: ConfigDict) -> Measure:
        """What validation measures first of all."""
        return Measure("map_", "mAP") if config.train.multi_label else Measure("top1_", "top-1")

    @classmethod
    def next_commands(cls, config: ConfigDict, workdir: str) -> list[str]:
        """What to do with a finished run: commands without `python -m fluxvit_jax.`."""
        searchable = config.data.holdout_fraction or config.search.split
        split = "" if searchable else " --config.search.split=LIST"
        search = [f"main --mode=search --workdir={workdir}{split}"]
        return [
            f"main --mode=evaluate --workdir={workdir}",
            *(search if not config.train.multi_label else ()),
            f"main --mode=predict --workdir={workdir} --video=VIDEO",
        ]

    @classmethod
    def extra_macs(cls, config: ConfigDict) -> tuple[float, float, float]:
        """Multiply-accumulates per clip of a forward pass, besides the network's.

        Returns those of trained parts, those of frozen parts, and those of the frozen parts'
        attention.
        """
        return 0.0, 0.0, 0.0


_registry: dict[str, type[Objective]] = {}


def register(name: str) -> Callable[[type[Objective]], type[Objective]]:
    """Class decorator that registers an objective as `config.train.objective=NAME`."""

    def add(objective: type[Objective]) -> type[Objective]:
        _registry[name] = objective
        return objective

    return add


def objective_class(config: ConfigDict) -> type[Objective]:
    """The class that `config.train.objective` names. Raises UserError if there is none."""
    name, package = config.train.objective, importlib.import_module("fluxvit_jax.objectives")
    files = {module.name for module in pkgutil.iter_modules(package.__path__)}
    if name not in _registry and name in files:
        importlib.import_module(f"fluxvit_jax.objectives.{name}")
    if name not in _registry:
        for file in sorted(files):
            importlib.import_module(f"fluxvit_jax.objectives.{file}")
        new = OLD_OBJECTIVES.get(name)
        hint = f"is called {new} now" if new else f"is none of {', '.join(sorted(_registry))}"
        raise UserError(f"config.train.objective: {name!r} {hint}")
    return _registry[name]


def check_objective(config: ConfigDict, training: bool = False) -> None:
    """Raises UserError if the objective of a config is unknown or does not support the config.

    training: whether to also check what only a training run needs.
    """
    objective = objective_class(config)
    if config.train.freeze != "none" and not objective.freezes:
        raise UserError(
            f"config.train.freeze: objective {config.train.objective} trains the whole network; "
            'set it to "none"'
        )
    adds_nothing = objective.init_params.__func__ is Objective.init_params.__func__  # type: ignore[attr-defined]
    if config.train.freeze == "all" and adds_nothing:
        raise UserError(
            f"config.train.freeze: objective {config.train.objective} trains the network alone, "
            '"all" leaves nothing of it; set it to "all_but_head"'
        )
    if config.train.multi_label and not objective.takes_multi_label:
        raise UserError(
            f"config.train.multi_label: objective {config.train.objective} learns from no more "
            "than one label a video; set it to False"
        )
    for name in ("data.sampling", "train.class_weights"):
        section, field = name.split(".")
        if config[section][field] == "balanced" and not objective.labelled:
            raise UserError(
                f"config.{name}: objective {config.train.objective} trains without labels, so it "
                "has no classes to balance"
            )
    objective.check(config)
    if training:
        objective.check_for_training(config)


def params_of_run(path: storage.PathLike, names: Sequence[str]) -> Tree:
    """Parameters of these names in a run or one of its steps, as numpy arrays; {} elsewhere."""
    path = storage.path_of(path)
    if not checkpointer.has_step(path):
        return {}
    stored = checkpointer.restore_params(path)
    return {name: stored[name] for name in names if name in stored}


def check_without_classes(config: ConfigDict, objective: str, reason: str) -> None:
    """Raises UserError for classes, and for what only a loss over classes can do.

    objective: its name in messages; reason: why there are no classes.
    """
    if config.model.classes != NO_CLASSES:
        raise UserError(
            f"config.model.classes: {config.model.classes}, but {reason}; leave it {NO_CLASSES}"
        )
    for name in ("mixup", "cutmix", "random_erasing", "label_smoothing"):
        if config.train[name]:
            raise UserError(f"config.train.{name}: {objective} has no such thing; leave it 0")


def multi_budget_value_and_grad(
    loss_at: Callable[[Tree, Any, int, Any], tuple[jax.Array, tuple[Tree, Any]]],
    positions: Callable[[Tree], Sequence[Any]],
    params: Tree,
    names: Sequence[int],
    carry: Any = None,
) -> tuple[Tree, Tree]:
    """Gradients of the sum of the losses at several token budgets, and metrics.

    The budgets run one after another, so only one budget's activations are in memory at a time: see
    `_in_turn`. Positions are computed once, before the loop. Gradients with respect to them are
    summed over the budgets and backpropagated once.

    Args:
        loss_at: (params, position, i, carry) -> (loss, (terms, carry)) of budget i. The returned
            `carry` is passed to the next budget, without gradient.
        positions: (params) -> the position of each budget's tokens.
        names: the budgets, for the names of metrics.

    Returns:
        Gradients in float32, and {"loss": the sum, "TERM_BUDGET": ...}.
    """
    position, positions_vjp = jax.vjp(positions, params)
    gradients: Tree | None = None
    metrics: Tree = {"loss": 0.0}
    d_positions = []
    for i, name in enumerate(names):
        if gradients is not None:  # otherwise XLA may run the budgets side by side
            params, gradients, carry = jax.lax.optimization_barrier((params, gradients, carry))

        def budget_loss(params: Tree, position: Any, carry: Any, i: int = i) -> tuple:
            return loss_at(params, position, i, carry)

        value_and_grad = jax.value_and_grad(budget_loss, argnums=(0, 1), has_aux=True)
        (loss, (terms, carry)), (d_params, d_position) = _in_turn(
            value_and_grad, params, position[i], carry
        )
        d_params = optax.tree.cast(d_params, jnp.float32)
        gradients = d_params if gradients is None else jax.tree.map(jnp.add, gradients, d_params)
        d_positions.append(d_position)
        metrics["loss"] += loss
        metrics |= {f"{term}_{name}": value for term, value in terms.items()}
    (through_positions,) = positions_vjp(d_positions)
    return jax.tree.map(jnp.add, gradients, through_positions), metrics


def _in_turn(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, and nothing of it before its arguments are there.

    With `fsdp` the TPU compiler's scheduler starts the work of several budgets at once, to hide
    exchanges of parameters behind it, and holds the activations of all. It does not look into a
    branch, so each budget gets one, which is always taken.
    """
    mesh = ambient_mesh()
    if mesh is None or mesh.shape["fsdp"] == 1 or mesh.abstract_device.platform != "tpu":
        return function(*arguments)
    always = jax.lax.optimization_barrier(jnp.array(True))  # otherwise the branch is folded away
    return jax.lax.cond(always, function, partial(zeros_of, function), *arguments)
