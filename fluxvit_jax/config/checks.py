"""Validation of a config: names, types and rules of its fields, and their combinations."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from fluxvit_jax.config.fields import CROP_RANGES, FIELDS, RENAMED, REQUIRED, TUPLES, flatten
from fluxvit_jax.config.grids import admissible_grids
from fluxvit_jax.config.variants import HEADS, VARIANTS
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import PATCH, Grid


def validate(config: ConfigDict) -> None:
    """Raises UserError, one line, for the first thing wrong with `config`.

    It checks the names, types, ranges and combinations of all fields. It does not check whether
    files exist, nor anything that depends on the number of devices.
    """
    values = flatten(config)
    check_names(values)
    check_types(values)
    _check_rules(values)
    _check_mesh(config)
    _check_model(config)
    _check_crop(config)
    _check_batch(config)
    _check_budgets(config)
    _check_optimizer(config)
    _check_balance(config)
    _check_multi_label(config)
    _check_evaluation(config)


def validate_for_training(config: ConfigDict) -> None:
    """Raises UserError if something is missing that only a training run needs.

    That is data to train on and, in some recipes, weights to start from.
    """
    if not config.data.train:
        raise UserError("no training data: add --config.data.train=LIST, a CSV of path,label")
    if config.train.init_from == REQUIRED:
        raise UserError(
            "this recipe starts from trained weights: add --config.train.init_from=CHECKPOINT "
            '(or "" to start from random ones)'
        )
    if config.train.early_stopping_epochs and not config.data.validation:
        raise UserError(
            "config.train.early_stopping_epochs: validation accuracy decides when to stop: add "
            "--config.data.validation=LIST"
        )
    if config.train.freeze != "none" and not config.train.init_from:
        raise UserError(
            f"config.train.freeze: {config.train.freeze} would keep random weights: add "
            "--config.train.init_from=CHECKPOINT"
        )


def suggestion(word: str, known: Sequence[str]) -> str:
    """ "; did you mean NAME?" with the most similar of `known`; "" if there are none.

    Similarity counts both the whole name and the part after its last dot.
    """

    def likeness(candidate: str) -> float:
        pairs = ((word, candidate), (word.rpartition(".")[2], candidate.rpartition(".")[2]))
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return f"; did you mean {max(known, key=likeness)}?" if known else ""


def check_name(name: str) -> None:
    if name in FIELDS:
        return
    if name in RENAMED:
        raise UserError(f"config.{name} is called {RENAMED[name]} now")
    inside = [f.removeprefix(f"{name}.") for f in FIELDS if f.startswith(f"{name}.")]
    if inside:
        raise UserError(f"config.{name} is a section; its fields are {', '.join(inside)}")
    raise UserError(f"config.{name}: no such field{suggestion(name, list(FIELDS))}")


def check_names(values: Mapping[str, Any]) -> None:
    for name in values:
        check_name(name)
    if missing := FIELDS.keys() - values.keys():
        raise UserError(f"config.{min(missing)} is missing: start from default_config()")


def _has_type(value: Any, expected: type) -> bool:
    if isinstance(value, bool):
        return expected is bool
    if expected is tuple:
        return isinstance(value, tuple | list)
    return isinstance(value, int | float if expected is float else expected)


TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "a tuple",
}


def type_message(name: str, value: Any) -> str:
    return f"config.{name}: {value!r} is not {TYPE_NAMES[type(FIELDS[name].default)]}"


def check_types(values: Mapping[str, Any]) -> None:
    """Raises UserError for a value of another type than its field's; values: of all fields."""
    for name, field in FIELDS.items():
        value = values[name]
        if not _has_type(value, type(field.default)):
            raise UserError(type_message(name, value))
        if name not in TUPLES:
            continue
        element_type, length = TUPLES[name]
        right_length = len(value) == length if length else len(value) > 0
        if not right_length or not all(_has_type(element, element_type) for element in value):
            kind = {int: "whole numbers", float: "numbers", tuple: "(budget, frames, resolution)"}
            raise UserError(
                f"config.{name}: {value} is not {length or 'one or more'} {kind[element_type]}, "
                f"such as {field.default}"
            )
    for setting in values["eval.settings"]:
        if len(setting) != 3 or not all(_has_type(element, int) for element in setting):
            raise UserError(
                f"config.eval.settings: {setting} is not (budget, frames, resolution), "
                "such as (1024, 12, 168)"
            )


def _check_rules(values: Mapping[str, Any]) -> None:
    for name, field in FIELDS.items():
        if problem := field.rule(values[name]):
            raise UserError(f"config.{name}: {problem}")


def _check_mesh(config: ConfigDict) -> None:
    if list(config.parallel.mesh.values()).count(-1) > 1:
        raise UserError("config.parallel.mesh: only one side can be -1, all that are left")


def check_resolution(name: str, resolution: int) -> None:
    if resolution % PATCH:
        near = max(1, round(resolution / PATCH)) * PATCH
        raise UserError(
            f"config.{name}: {resolution} px is no multiple of the patch size {PATCH}; "
            f"the nearest is {near}"
        )


def _check_model(config: ConfigDict) -> None:
    check_resolution("model.resolution", config.model.resolution)
    depth, freeze = VARIANTS[config.model.variant].depth, config.train.freeze
    if freeze.isdigit() and int(freeze) > depth:
        raise UserError(
            f"config.train.freeze: {freeze} blocks are more than FluxViT-{config.model.variant} "
            f"has, {depth}"
        )
    if config.model.selector.groups and config.model.selector.kind != "group_dynamic":
        raise UserError(
            f"config.model.selector.groups: only group_dynamic has groups, "
            f"not {config.model.selector.kind}"
        )


def _check_crop(config: ConfigDict) -> None:
    augment = config.data.augment
    for name in CROP_RANGES if augment.crop == "multi_scale" else ():
        default = FIELDS[f"data.augment.{name}"].default
        if tuple(augment[name]) != default:
            raise UserError(
                f"config.data.augment.{name}: multi_scale has crops of its own; leave it "
                f"{default}, or set data.augment.crop=random_resized"
            )


def _check_batch(config: ConfigDict) -> None:
    batch, group = config.train.batch_size, config.data.clips_per_grid
    repeats = config.data.repeated_aug
    if group % repeats:
        raise UserError(
            f"config.data.clips_per_grid: {group} clips that share a grid are no multiple of "
            f"data.repeated_aug={repeats}, the clips of one video"
        )
    if batch % (unit := group * config.train.grad_accum_steps):
        raise UserError(
            f"config.train.batch_size: {batch} clips do not split into groups of "
            f"data.clips_per_grid={group} in each of "
            f"train.grad_accum_steps={config.train.grad_accum_steps} parts; "
            f"the nearest that does is {max(1, round(batch / unit)) * unit}"
        )
    if group == 1 and (config.train.mixup or config.train.cutmix):
        raise UserError(
            "config.data.clips_per_grid: mixup and cutmix mix clips that share a grid; with groups "
            "of 1 set train.mixup=0 and train.cutmix=0"
        )


def _check_budgets(config: ConfigDict) -> None:
    budgets = tuple(config.train.budgets)
    if len(budgets) > HEADS or list(budgets) != sorted(set(budgets), reverse=True):
        raise UserError(
            f"config.train.budgets: {budgets} must be at most {HEADS} numbers, largest first"
        )
    grids = admissible_grids(config)
    largest = max(grid.tokens for grid in grids)
    if budgets[0] > largest:
        raise UserError(
            f"config.train.budgets: no grid can fill {budgets[0]} tokens, the largest of "
            f"data.grids has {largest}"
        )
    if config.model.selector.kind == "none" and largest > budgets[-1]:
        raise UserError(
            f"config.model.selector.kind: none keeps every token, but a grid of data.grids has "
            f"{largest} and train.budgets asks for {budgets[-1]}"
        )


def _check_optimizer(config: ConfigDict) -> None:
    if config.train.warmup_epochs > config.train.epochs:
        raise UserError(
            f"config.train.warmup_epochs: {config.train.warmup_epochs} is more than "
            f"train.epochs={config.train.epochs}"
        )
    if config.optim.min_learning_rate > config.optim.learning_rate:
        raise UserError(
            f"config.optim.min_learning_rate: {config.optim.min_learning_rate} is above "
            f"optim.learning_rate={config.optim.learning_rate}"
        )


def _check_balance(config: ConfigDict) -> None:
    if config.train.class_weights == config.data.sampling == "balanced":
        raise UserError(
            "config.train.class_weights: data.sampling=balanced shows all classes equally often "
            "already; set one of the two"
        )


def _check_multi_label(config: ConfigDict) -> None:
    if not config.train.multi_label:
        return
    values = flatten(config)
    for name, neutral in (
        ("train.label_smoothing", 0.0),
        ("train.class_weights", "none"),
        ("data.sampling", "uniform"),
        ("eval.plan", ""),  # a search ranks by top-1
        ("eval.cascade", ""),
    ):
        if values[name] != neutral:
            raise UserError(
                f"config.{name}: {values[name]} is for one label a video; with train.multi_label "
                f"set it to {neutral!r}"
            )


def _check_evaluation(config: ConfigDict) -> None:
    """A budget of more tokens than the grid has is no error: every token is kept."""
    if config.eval.frames == "middle" and config.eval.clips > 1:
        raise UserError(
            f"config.eval.clips: {config.eval.clips} clips of a video have no frames in the middle "
            "of its segments; set it to 1, or eval.frames=spread"
        )
    if config.eval.resize == "squeeze" and config.eval.crops > 1:
        raise UserError(
            f"config.eval.crops: eval.resize=squeeze makes one view, not {config.eval.crops}; set "
            "it to 1"
        )
    settings = config.eval.settings
    for budget, frames, resolution in settings:
        if min(budget, frames, resolution) <= 0:
            raise UserError(f"config.eval.settings: {(budget, frames, resolution)} must be above 0")
        check_resolution("eval.settings", resolution)
        tokens = Grid.square(frames, resolution).tokens
        if config.model.selector.kind == "none" and tokens > budget:
            raise UserError(
                f"config.eval.settings: {frames} frames of {resolution} px have {tokens} tokens, "
                f"and model.selector.kind=none cannot bring them down to {budget}"
            )
    budgets = [setting[0] for setting in settings]
    if twice := {budget for budget in budgets if budgets.count(budget) > 1}:
        raise UserError(
            f"config.eval.settings: {min(twice)} tokens twice, but results are kept by budget"
        )
