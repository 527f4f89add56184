"""Training: `train` is the one loop, read from top to bottom; below it are its parts.

A run is a function of its config and data. Everything random is drawn from the seed and the number
of a step or sample, and a checkpoint holds the rest, so the same command goes on where a workdir
stopped, and leaves the same numbers behind as a run that was never stopped.
"""

import math
import os
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from fluxvit_jax import distributed, optim, parallel, sharding, storage
from fluxvit_jax.budgets import Grid, capacity
from fluxvit_jax.checkpoint import Checkpoints
from fluxvit_jax.config import admissible_grids, is_distillation, validate_for_training
from fluxvit_jax.data.annotations import Source, open_source
from fluxvit_jax.data.lessons import open_lessons
from fluxvit_jax.data.pipeline import train_batches, training_source
from fluxvit_jax.devices import device_name
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluate import evaluate
from fluxvit_jax.interruption import Interruption
from fluxvit_jax.metrics import Metrics, Progress
from fluxvit_jax.state import abstract_params, abstract_state, frozen_parameters, initial_state
from fluxvit_jax.step import abstract_batch, device_batch, make_objective, make_train_step
from fluxvit_jax.workdir import BAD_CLIPS, CONFIG, BadClips, check_workdir, noted, write_config

Tree = dict[str, Any]

VALIDATION = "validation"  # split of the metrics
# Bad clips stop a run only once so many were drawn (or an epoch, if that is less): one bad file in
# the first batch says nothing about the data.
JUDGED_CLIPS = 200


def train(config: ConfigDict, workdir: str | os.PathLike) -> int:
    """Trains as `config` says, or goes on with what the workdir holds.

    Returns the exit status: 0 when the run is finished, 128 + signal when Ctrl-C or SIGTERM ended
    it, after a checkpoint.

    Raises:
        UserError: a config, data set, workdir or checkpoint that cannot be used; a loss that is no
            number; more unreadable clips than `data.max_bad_fraction`.
    """
    workdir = storage.path_of(workdir)
    with distributed.together():
        validate_for_training(config)
        check_workdir(workdir, config)
        source = training_source(config)
        lessons = open_lessons(config, source)
        validation = _open_validation(config)
        mesh = parallel.make_mesh(config)
        sharding.check(config, abstract_params(config), mesh)
        check_batch_size(config, parallel.clip_shards(mesh))
        length = run_length(config, len(source))
    distributed.check_same_videos(training=source, validation=validation)
    grids = admissible_grids(config)
    frozen = frozen_parameters(config, mesh)

    objective = make_objective(config, grids, parallel.platform_of(mesh))
    optimizer = optim.make_optimizer(config, length.total, abstract_params(config))
    rates = optim.learning_rates(config, length.total)
    train_step = make_train_step(config, objective, optimizer, mesh)

    with (
        Interruption() as interruption,
        Checkpoints(workdir, config.checkpoint.keep, config.checkpoint.every_steps) as checkpoints,
        closing(Metrics(workdir)) as metrics,
    ):
        restored = checkpoints.restore_latest(abstract_state(config, optimizer, mesh))
        if restored is None:
            start, state = 0, initial_state(config, optimizer, mesh)
        else:
            start, state, position = restored
            check_videos(position["videos"], source, workdir)
            parallel.say(f"going on from step {start} of {length.total}")
        # A run that was ended while it evaluated has still to do that.
        owed = validation is not None and length.evaluates_at(start)
        owed = owed and not distributed.from_first_host(lambda: noted(workdir, start, VALIDATION))
        if start == length.total and not owed:
            parallel.say(f"the run in {workdir} is finished: all {length.total} steps are done")
            return 0
        parallel.say(f"training on {mesh.size} x {device_name(mesh.devices.flat[0])}")
        with distributed.together():
            write_config(workdir, config)
            metrics.rewind(start)
            bad_clips = BadClips(workdir, start)
        distributed.check_shared(workdir / CONFIG)

        progress = Progress(
            length.total,
            length.steps_per_epoch,
            config.train.batch_size,
            start_step=start,
            every=config.log.every_steps,
        )
        batches = train_batches(
            config,
            source,
            start_step=start,
            groups=parallel.own_rows(mesh, config.train.batch_size // config.data.grid_group),
            lessons=lessons,
        )

        def validate(step: int) -> dict[str, float] | None:
            """Evaluates the model (its average, if kept); what chooses the best checkpoint."""
            params = state.get("ema", state["params"])
            with progress.paused():
                evaluation = evaluate(params, config, validation, mesh, interruption.agree)
            if evaluation is None:
                return None
            scalars = evaluation.scalars()
            metrics.write(step, VALIDATION, scalars)
            parallel.say(f"step {step}: {', '.join(f'{k} {v:.4g}' for k, v in scalars.items())}")
            return {"top1": scalars[f"top1_{config.eval.settings[0][0]}"]}

        # Compiled now, since a program must begin on all hosts at once, give or take seconds.
        train_step.lower(state, frozen, abstract_batch(config, grids, mesh)).compile()
        distributed.meet()

        with closing(batches), closing(progress), closing(bad_clips):
            if owed:
                validate(start)
            saved = start
            pending, heard = [], 0  # measured by the latest steps, still on the devices
            for step in range(start + 1, length.total + 1):
                if interruption.happened() and saved == step - 1:
                    break
                batch = next(batches)
                bad_clips.note(step, batch["failure"])
                placed = parallel.put(device_batch(batch, interruption.heard), mesh)
                with jax.transfer_guard("disallow"):
                    state, measured = train_step(state, frozen, placed)
                # Waits for the step before: batches must not pile up on the devices.
                interruption.learn(int(heard))
                heard = measured.pop("stop")
                pending.append(measured)

                last = step == length.total
                log = step % config.log.every_steps == 0 or last
                evaluating = validation is not None and length.evaluates_at(step)
                saving = checkpoints.due(step) or evaluating or last or interruption.happened()
                if log or saving:
                    bad_clips.write()
                    numbers = fetch_finite(pending, step)
                    pending = []
                    check_bad_clips(config, length, step, numbers["bad_clips"], workdir)
                if log:
                    metrics.write(
                        step,
                        "train",
                        numbers | {"learning_rate": rates[step - 1]},
                        timings={"clips_per_second": progress.clips_per_second},
                    )
                progress.advance(numbers["loss"] if log else None)
                if step == start + 1 or last:
                    check_compilations(train_step, config, grids, announce=not last)
                if saving:
                    quality = validate(step) if evaluating else None
                    metrics.save()
                    bad_clips.save()
                    position = batches.state() | {"videos": len(source)}
                    checkpoints.save(step, state, position, config, quality)
                    saved = step
        if interruption.happened():
            checkpoints.wait()
            parallel.say(f"stopped at step {saved}; the same command goes on from there")
        return interruption.status


# ---------------------------------------------------------------------------------------------
# The run


class RunLength(NamedTuple):
    """Steps of a run."""

    steps_per_epoch: int
    total: int
    evaluation_every: int

    def evaluates_at(self, step: int) -> bool:
        """Whether the model is evaluated after `step`: regularly, and at the end."""
        return step > 0 and (step % self.evaluation_every == 0 or step == self.total)


def run_length(config: ConfigDict, videos: int) -> RunLength:
    """Raises UserError if an epoch of `videos` videos is less than a batch."""
    clips, batch_size = videos * config.data.repeats, config.train.batch_size
    steps = clips // batch_size
    if not steps:
        raise UserError(
            f"config.train.batch_size: {batch_size} clips are more than an epoch of "
            f"{config.data.train} has, {clips}"
        )
    return RunLength(steps, config.train.epochs * steps, config.eval.every_epochs * steps)


def check_batch_size(config: ConfigDict, shards: int) -> None:
    """Raises UserError unless each of `shards` gets whole groups in every part of a batch."""
    group, parts, size = config.data.grid_group, config.train.accumulate, config.train.batch_size
    unit = group * parts * shards
    if size % unit:
        raise UserError(
            f"config.train.batch_size: {size} clips do not split into groups of "
            f"data.grid_group={group} on each of {shards} devices in each of "
            f"train.accumulate={parts} parts; the nearest that does is "
            f"{max(1, round(size / unit)) * unit}"
        )


def check_compilations(
    train_step: Callable, config: ConfigDict, grids: tuple[Grid, ...], announce: bool
) -> None:
    """RuntimeError if there are more compiled steps than `train.compiled_steps` allows."""
    compiled, allowed = train_step._cache_size(), config.train.compiled_steps
    steps = f"{compiled} compiled training step{'s' * (compiled != 1)}"
    if compiled > allowed:
        raise RuntimeError(f"{steps} where config.train.compiled_steps is {allowed}")
    if announce:
        parallel.say(f"{steps} for {len(grids)} grids, capacity P={capacity(grids)}")


def check_videos(before: int, source: Source, workdir: epath.Path) -> None:
    """Raises UserError if the run was begun with another number of videos than `source` has."""
    if before != len(source):
        raise UserError(
            f"the run in {workdir} was begun with {before} videos to train on, now there are "
            f"{len(source)}; use another workdir"
        )


def check_bad_clips(
    config: ConfigDict, length: RunLength, step: int, bad: int, workdir: epath.Path
) -> None:
    """Raises UserError if more clips than `data.max_bad_fraction` were replaced until `step`."""
    size = config.train.batch_size
    drawn = step * size
    enough = drawn >= min(JUDGED_CLIPS, length.steps_per_epoch * size)
    if enough and bad > config.data.max_bad_fraction * drawn:
        raise UserError(
            f"{bad} of {drawn} training clips could not be read, more than "
            f"config.data.max_bad_fraction={config.data.max_bad_fraction}; they are listed in "
            f"{workdir / BAD_CLIPS}"
        )


def fetch_finite(pending: list[Tree], step: int) -> dict[str, float | int]:
    """What the last of the steps until `step` measured; `pending` has those not looked at yet.

    Raises UserError if the loss or gradient of any is no finite number.
    """
    fetched = jax.device_get(pending)
    for number, measured in enumerate(fetched, step - len(fetched) + 1):
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(measured[name]):
                raise UserError(
                    f"step {number}: the {name.replace('_', ' ')} is {measured[name]}; the "
                    "checkpoints from before are intact; try a lower config.optim.learning_rate or "
                    "config.optim.clip_norm=1"
                )
    return {name: value.item() for name, value in fetched[-1].items()}


def _open_validation(config: ConfigDict) -> Source | None:
    if config.data.validation:
        return open_source(config.data.validation, config.data.root, config.model.classes)
    if not is_distillation(config):
        parallel.say("no config.data.validation: the model is not evaluated on the way")
    return None
