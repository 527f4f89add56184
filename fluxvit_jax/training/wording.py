"""What a run says of itself: at its start, when it goes on, at its end."""

import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from fluxvit_jax.checkpoints.checkpointer import best_step
from fluxvit_jax.checkpoints.workdir import metrics_by_step, read_config
from fluxvit_jax.data.annotations import is_list
from fluxvit_jax.data.prepared_source import is_prepared, split_of
from fluxvit_jax.distributed import storage
from fluxvit_jax.grids import PATCH
from fluxvit_jax.objectives.base import objective_class
from fluxvit_jax.training import nonfinite
from fluxvit_jax.training.optimizer import learning_rates
from fluxvit_jax.training.setup import Setup
from fluxvit_jax.training.validation import VALIDATION, Validation

TOTAL = "total_steps"  # of the run's schedule, in a checkpoint
VIEW_FIELDS = ("clips", "crops", "frames", "resize", "seconds")  # of `config.eval`


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


def describe_new_schedule(setup: Setup, step: int, saved: Mapping[str, Any]) -> str:
    """How the learning rate goes on if the run was given more steps or a lower rate; or "".

    step: the last one done; saved: what its checkpoint holds beside the state.
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
    steps = saved.get(TOTAL, earlier.train.epochs * setup.schedule.steps_per_epoch)
    if steps != setup.schedule.total and earlier.train.epochs == config.train.epochs:
        changes.append(f"{setup.schedule.total} steps in place of {steps}")
    if not changes:
        return ""
    skipped, _ = saved.get(nonfinite.SAVED, (0, 0))  # steps by which the schedule has not gone on
    done = step - skipped
    last = learning_rates(earlier, steps)[max(min(done, steps), 1) - 1]
    return (
        f"{' and '.join(changes)}: the learning rate goes on along the new schedule: {last:.3g} "
        f"before, {rates[done]:.3g} now, {rates[-1 - skipped]:.3g} at the end"
    )


def describe_new_validation(setup: Setup) -> str:
    """A warning if validation asks otherwise than before the run was resumed; or ""."""
    before, now = read_config(setup.workdir), setup.config.to_dict()
    if not before or setup.data.validation is None:
        return ""
    earlier = _ranking(before["eval"])
    changed = [
        f"eval.{name}"
        for name, value in _ranking(now["eval"]).items()
        if value != earlier.get(name, value)
    ]
    if not changed:
        return ""
    return (
        f"warning: other {' and '.join(changed)} than before: validation numbers, and which "
        "checkpoint is the best, cannot be compared with those from before"
    )


def _ranking(section: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `config.eval` that the metric which ranks checkpoints depends on, as JSON."""
    first = {"settings": section["settings"][:1]}
    views = {name: value for name, value in section.items() if name in VIEW_FIELDS}
    return json.loads(json.dumps(first | views))


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
            if name.startswith(measure.start) and value is not None
        ]
        lines = [f"best checkpoint: step {step}, {measure.word} {', '.join(values)}"]
    commands = objective.next_commands(config, os.fspath(workdir))
    return "\n".join([*lines, "next:", *(f"  python -m fluxvit_jax.{own}" for own in commands)])
