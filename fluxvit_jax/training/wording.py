"""What a run says of itself: at its start, when it goes on, at its end."""

import os

from etils import epath
from ml_collections import ConfigDict

from fluxvit_jax.checkpoints.checkpointer import best_step
from fluxvit_jax.checkpoints.workdir import metrics_by_step, read_config
from fluxvit_jax.data.annotations import is_list
from fluxvit_jax.data.prepared_source import is_prepared, split_of
from fluxvit_jax.distributed import storage
from fluxvit_jax.grids import PATCH
from fluxvit_jax.objectives.base import objective_class
from fluxvit_jax.training.optimizer import learning_rates
from fluxvit_jax.training.setup import Setup
from fluxvit_jax.training.validation import VALIDATION, Validation


def describe_run(setup: Setup) -> str:
    """What a run has found and will do, in a few lines."""
    config, data, grids = setup.config, setup.data, setup.grids
    labelled = objective_class(config).labelled
    classes = f" of {config.model.classes} classes" if labelled else ""
    validation = f", {len(data.validation)} to validate on" if data.validation is not None else ""
    budgets = ", ".join(map(str, config.train.budgets))
    if len(setup.objective.turns()) > 1:
        budgets += " in turn, one a step"
    tokens = [grid.tokens for grid in grids]
    return "\n".join(
        [
            f"data: {len(data.training)} videos{classes} to train on{validation}",
            f"schedule: {config.train.epochs} epochs of {setup.schedule.steps_per_epoch} steps, "
            f"{config.train.batch_size} clips a step",
            f"tokens: budgets of {budgets}, selected from the {min(tokens)} to {max(tokens)} of "
            f"{len(grids)} grids",
            f"workdir: {setup.workdir}",
        ]
    )


def describe_new_schedule(setup: Setup, step: int) -> str:
    """How the learning rate goes on if the run was given more epochs or a lower rate; or "".

    step: the last one done.
    """
    config, rates, before = setup.config, setup.rates, read_config(setup.workdir)
    if not before or step >= len(rates):
        return ""
    earlier = ConfigDict(config.to_dict())
    earlier.train.epochs = before["train"]["epochs"]
    earlier.optim.learning_rate = before["optim"]["learning_rate"]
    changes = []
    if earlier.train.epochs != config.train.epochs:
        changes.append(f"{config.train.epochs} epochs in place of {earlier.train.epochs}")
    if earlier.optim.learning_rate != config.optim.learning_rate:
        new, old = config.optim.learning_rate, earlier.optim.learning_rate
        changes.append(f"a learning rate of {new:.3g} in place of {old:.3g}")
    if not changes:
        return ""
    steps = earlier.train.epochs * setup.schedule.steps_per_epoch
    last = learning_rates(earlier, steps)[step - 1]
    return (
        f"{' and '.join(changes)}: the learning rate goes on along the new schedule: {last:.3g} "
        f"before, {rates[step]:.3g} now, {rates[-1]:.3g} at the end"
    )


def describe_waiting(setup: Setup, share: float) -> str:
    """What to do about waiting for data for a share of the time."""
    data, workers, cores = setup.config.data, setup.config.data.workers, os.cpu_count() or 1
    cures = []
    if workers < cores:
        cures.append(f"--config.data.workers={cores} (now {workers})")
    folder, _ = split_of(data.train)
    if storage.is_remote(folder) or is_prepared(folder):
        cures.append("smaller videos, prepared from copies that fluxvit_jax.data.shrink writes")
    else:
        # As much larger than what is cropped from it as Kinetics, 256 px for 224.
        root = data.root or (os.path.dirname(folder) if is_list(folder) else folder)
        short_side = max(grid.rows for grid in setup.grids) * PATCH * 8 // 7
        cures.append(
            f"smaller copies of the videos (python -m fluxvit_jax.data.shrink --root={root or '.'} "
            f"--out=SMALL --short_side={short_side}) in a new workdir"
        )
    return (
        f"reading videos is slower than training on them: {share:.0%} of the time is spent "
        f"waiting; what helps: {'; '.join(cures)}"
    )


def describe_finished(setup: Setup, validation: Validation, start: int) -> str:
    """What to say of a run that has nothing left to do at step `start`; "" if it has."""
    if validation.pending:
        return ""
    total, workdir = setup.schedule.total, setup.workdir
    if start >= total:
        result = describe_result(setup.config, workdir)
        return f"the run in {workdir} is finished: all {total} steps are done\n{result}"
    if reason := validation.reason_to_stop():
        return (
            f"the run in {workdir} is finished: it stopped early at step {start} of {total}, "
            f"{reason}; a larger config.train.early_stopping_epochs goes on"
        )
    return ""


def describe_end(setup: Setup, validation: Validation, step: int) -> str:
    """What to say at the end, after step `step`: whether all steps were done, and the result."""
    total, workdir = setup.schedule.total, setup.workdir
    line = f"finished: all {total} steps are done, in {workdir}"
    if step < total:
        line = f"stopped early at step {step} of {total}, {validation.reason_to_stop()}"
    return f"{line}\n{describe_result(setup.config, workdir)}"


def describe_result(config: ConfigDict, workdir: epath.Path) -> str:
    """The accuracy of the best checkpoint, and what to type next."""
    objective = objective_class(config)
    measure = objective.measure(config)
    lines = []
    step = best_step(workdir)
    if step is not None and (numbers := dict(metrics_by_step(workdir, VALIDATION)).get(step)):
        values = [
            f"{value:{'.4g' if measure.falls else '.2%'}} at {name.removeprefix(measure.start)} "
            "tokens"
            for name, value in numbers.items()
            if name.startswith(measure.start)
        ]
        lines = [f"best checkpoint: step {step}, {measure.word} {', '.join(values)}"]
    commands = objective.next_commands(config, os.fspath(workdir))
    return "\n".join([*lines, "next:", *(f"  python -m fluxvit_jax.{own}" for own in commands)])
