"""Training: `train` opens a run, and `Run.train` is the loop; their parts follow below.

A run is a function of its config and data. Everything random is drawn from the seed and the number
of a step or sample, and a checkpoint holds the rest. So the same command resumes a workdir, and
leaves the same numbers as a run that was never stopped.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from fluxvit_jax.checkpoints.checkpointer import FOLDER, Checkpoints
from fluxvit_jax.checkpoints.workdir import (
    BAD_CLIPS,
    CONFIG,
    BadClips,
    last_logged_step,
    set_run_aside,
    write_class_names,
    write_config,
)
from fluxvit_jax.checkpoints.workdir_lock import WorkdirLock
from fluxvit_jax.data import splits
from fluxvit_jax.data.media import turn_of_step
from fluxvit_jax.data.mixture import Mixture
from fluxvit_jax.data.pipeline import Batches, plan_groups, train_batches
from fluxvit_jax.data.sources import Source
from fluxvit_jax.data.supervised_workers import Quarantine
from fluxvit_jax.distributed import storage
from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.devices import device_name
from fluxvit_jax.distributed.hosts import (
    barrier,
    check_shared,
    compute_on_host0,
    raise_on_all_hosts,
)
from fluxvit_jax.distributed.interrupts import ended_by_signals_again
from fluxvit_jax.distributed.mesh import (
    host_count,
    host_index,
    local_row_indices,
    platform_of,
    shard_batch,
)
from fluxvit_jax.distributed.watchdog import Watchdog
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import Grid, capacity
from fluxvit_jax.objectives.base import Objective, objective_class
from fluxvit_jax.training import wording
from fluxvit_jax.training.compile_time import describe_compile_time
from fluxvit_jax.training.goodput import Goodput
from fluxvit_jax.training.metrics import Metrics, Progress
from fluxvit_jax.training.nonfinite import NonfiniteSteps
from fluxvit_jax.training.preemption import PreemptionHandler
from fluxvit_jax.training.profiling import ProfiledStep
from fluxvit_jax.training.setup import Setup, set_up
from fluxvit_jax.training.train_state import abstract_state, initial_state, parameter_overview
from fluxvit_jax.training.train_step import (
    NO_BATCH,
    abstract_batch,
    device_batch,
    empty_batch,
    make_objective,
    make_train_step,
)
from fluxvit_jax.training.validation import Validation

Tree = dict[str, Any]

# Clips drawn (or an epoch, if that is less) before bad ones can stop a run: one bad file in the
# first batch says nothing about the data.
MIN_CLIPS_BEFORE_ABORT = 200
ADVISED_AFTER = 30.0  # seconds of steps, which tell whether reading videos is too slow
ADVISED_ABOVE = 0.5  # share of them spent waiting for data


def train(
    config: ConfigDict,
    workdir: storage.PathLike,
    accept_data_change: bool = False,
    fresh: bool = False,
) -> int:
    """Trains as `config` says, or resumes the run in the workdir.

    accept_data_change: resume although the videos, labels or class names have changed.
    fresh: start anew, and keep an earlier run's files aside.

    Returns the exit status: 0 when the run is finished, 128 + signal when Ctrl-C or SIGTERM ended
    it, after a checkpoint. (In the program, a signal before the first step ends the process.)

    Raises:
        UserError: a config, data set, workdir or checkpoint that cannot be used; lost checkpoints;
            too many steps in a row without a finite loss; more unreadable clips than
            `data.max_bad_fraction`; no validation video that can be read.
    """
    goodput = Goodput(storage.path_of(workdir))
    setup = set_up(config, workdir, fresh)
    with open_tools(setup, goodput) as tools:
        if fresh:
            keep_earlier_run(setup.workdir)
        with stopped_at_once():
            start = restore_or_initialize(setup, tools.checkpoints, accept_data_change)
        validation = Validation(setup, tools.metrics, tools.watchdog, start.step)
        if quality := validation.quality_of(start.step):  # a kill may have come before
            tools.checkpoints.rate(start.step, quality)
        if not start.step:
            check_not_lost(setup.workdir, tools.checkpoints, validation)
        if line := wording.describe_finished(setup, validation, start.step):
            say(line)
            return 0
        announce(setup, start.state)
        with open_run(setup, tools, validation, start) as run:
            run.train()
        goodput.enter("checkpoint")
        tools.checkpoints.wait()
        goodput.write()
        say(goodput.describe())
        if summary := run.bad_clips.summary:
            say(summary)
        if tools.preemption.should_stop():
            say(f"stopped at step {run.saved_step}; the same command goes on from there")
        else:
            say(wording.describe_end(setup, validation, run.saved_step))
        return tools.preemption.status


class Tools(NamedTuple):
    """What the process of a run holds open from its beginning to its end."""

    lock: WorkdirLock
    preemption: PreemptionHandler
    watchdog: Watchdog
    checkpoints: Checkpoints
    metrics: Metrics
    goodput: Goodput


class Start(NamedTuple):
    """Where a run begins or goes on.

    step: the last one done. state: on the devices; the next step takes it. saved: what else the
    checkpoint of that step holds, or nothing.
    """

    step: int
    state: Tree
    saved: Tree


@dataclass(kw_only=True, slots=True)
class Run:
    """A run from its first step in this process to its last: `train` is the loop.

    identity: of the data, with the class names; checkpoints hold it.
    state: after the latest step, on the devices.
    saved_step: that of the latest checkpoint.
    pending: scalars of the steps since the last look at them, still on the devices.
    stops: "stop" of the latest two steps, on the devices.
    batch_comes: whether this host still gets batches.
    advised: whether it was said that reading videos is too slow.
    """

    setup: Setup
    tools: Tools
    validation: Validation
    bad_clips: BadClips
    progress: Progress
    batches: Batches
    step_fn: ProfiledStep
    nonfinite: NonfiniteSteps
    identity: Tree
    state: Tree
    saved_step: int
    pending: list[Tree] = field(default_factory=list)
    stops: tuple[Any, Any] = (0, 0)
    batch_comes: bool = True
    advised: bool = False

    def train(self) -> None:
        """The steps that are left, until the last one or a reason to stop before it."""
        if self.validation.pending:
            self.validate(self.saved_step)
        self.tools.watchdog.alive()
        for step in range(self.saved_step + 1, self.setup.schedule.total + 1):
            if self.ends_before(step):
                break
            batch = self.next_batch()
            if batch is None and host_count() == 1:
                self.stop_after(step - 1)
                break
            self.train_on(batch, step)

            logs, saves = self.logs_at(step), self.saves_at(step)
            if host_count() > 1 and (logs or saves):  # which wait for this step in any case
                self.learn_of_signals()
                saves = saves or self.tools.preemption.should_stop()
                if in_vain := sum(int(stop) >= NO_BATCH for stop in self.stops):
                    del self.pending[-in_vain:]
                    self.stop_after(step - in_vain)
                    break
            numbers = self.numbers_of(step) if logs or saves else {}
            if logs:
                self.log(step, numbers)
            self.progress.advance(numbers["loss"] if logs else None)
            if saves:
                self.save_and_validate(step)

    def ends_before(self, step: int) -> bool:
        """Whether the run has ended early, or was stopped and all steps so far are saved."""
        stopped = self.tools.preemption.should_stop
        return bool(self.validation.reason_to_stop()) or (stopped() and self.saved_step == step - 1)

    def next_batch(self) -> dict[str, np.ndarray] | None:
        """This host's part; None if it is stopped while waiting, say for a clip that hangs."""
        self.tools.goodput.enter("data_wait")
        if not self.batch_comes:
            return None
        batch = self.batches.next_unless(self.tools.preemption.stops_waiting)
        self.batch_comes = batch is not None
        return batch

    def train_on(self, batch: dict[str, np.ndarray] | None, step: int) -> None:
        """Begins the step; returns once the one before is done.

        Without a batch this host does it in vain: the others may have begun it, and it takes all.
        """
        setup, tools = self.setup, self.tools
        tools.goodput.enter("step")
        if batch is None:
            grids = grids_of_step(setup, step)
            inputs = empty_batch(setup.config, grids, setup.mesh, tools.preemption.heard())
        else:
            self.bad_clips.note(step, batch["failure"])
            clip_fields = setup.objective.clip_fields(setup.config)
            inputs = device_batch(batch, tools.preemption.heard(), clip_fields)
        sharded = shard_batch(inputs, setup.mesh)
        with jax.transfer_guard("disallow"):
            self.state, scalars = self.step_fn(step, self.state, setup.frozen, sharded)
        # Wait for the step before: batches must not pile up on the devices.
        self.learn_of_signals()
        tools.watchdog.alive()
        tools.lock.check()
        self.stops = (self.stops[-1], scalars.pop("stop"))
        self.pending.append(scalars)

    def learn_of_signals(self) -> None:
        """Waits for the latest step in `stops`, which tells what signals the hosts have got."""
        self.tools.preemption.update(int(self.stops[-1]) % NO_BATCH)

    def logs_at(self, step: int) -> bool:
        """Whether the step's numbers are written: regularly, each turn's, and at the end."""
        since = step % self.setup.config.log.every_steps
        if step == self.setup.schedule.total or since == 0:
            return True
        if len(self.setup.objective.turns()) == 1:
            return False
        *others, own = (
            kind_of_step(self.setup, one) for one in range(max(1, step - since), step + 1)
        )
        return own not in others

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint of the step is due, as far as this host knows."""
        return (
            step == self.setup.schedule.total
            or self.validation.due(step)
            or self.tools.checkpoints.due(step)
            or self.tools.preemption.should_stop()
        )

    def numbers_of(self, step: int) -> dict[str, Any]:
        """The scalars of the latest step, as `fetch`.

        Raises UserError if too many clips were replaced, or too many steps in a row skipped.
        """
        self.bad_clips.write()
        numbers = self.fetch(step)
        check_bad_clips(self.setup, step, numbers["bad_clips"])
        return numbers

    def fetch(self, step: int) -> dict[str, Any]:
        """The scalars of `step`, the last of the pending steps, with the number of skipped steps.

        Raises UserError if too many steps in a row were skipped.
        """
        fetched = jax.device_get(self.pending)
        self.pending = []
        for number, scalars in enumerate(fetched, step - len(fetched) + 1):
            self.nonfinite.note(number, scalars)
        numbers = {name: value.item() for name, value in fetched[-1].items() if name != "skipped"}
        return numbers | {"skipped_steps": self.nonfinite.total}

    def log(self, step: int, numbers: dict[str, Any]) -> None:
        """Writes the numbers of a step, with its learning rate."""
        # The schedule goes by the steps before this one that were not skipped.
        skipped = self.nonfinite.total - (self.nonfinite.in_row > 0)
        rate = self.setup.rates[step - 1 - skipped]
        self.tools.metrics.write(
            step,
            "train",
            numbers | {"learning_rate": rate},
            timings={
                "clips_per_second": self.progress.clips_per_second,
                "goodput": self.tools.goodput.share,
            },
        )
        self.tools.goodput.flush()
        self.advise()

    def advise(self) -> None:
        """Says once what to do if reading videos is what takes the time."""
        seconds, share = self.tools.goodput.waiting
        if not self.advised and seconds > ADVISED_AFTER and share > ADVISED_ABOVE:
            self.advised = True
            say(wording.describe_waiting(self.setup, share))

    def save_and_validate(self, step: int) -> None:
        """Saves the step, and then evaluates the model, if that is due.

        So nothing is lost if the evaluation fails, hangs or is stopped.
        """
        self.save_logs()
        # Weights that give no finite loss are not saved on the way.
        last = step == self.setup.schedule.total
        if not self.nonfinite.in_row or last or self.tools.preemption.should_stop():
            self.save(step)
        if self.validation.due(step):
            self.validate(step)

    def validate(self, step: int) -> None:
        """Evaluates the model as `Validation.run`, which ranks the step's checkpoint, if any."""
        tools, saved = self.tools, self.saved_step == step
        at_once: AbstractContextManager[None] = nullcontext()
        if saved and host_count() == 1:  # several hosts go on writing it meanwhile
            tools.checkpoints.wait()
            at_once = stopped_at_once()
        tools.goodput.enter("evaluation")
        with at_once:
            self.validation.run(
                step, self.state, self.progress, tools.preemption.sync, self.bad_clips.quarantine
            )
        if saved:
            tools.goodput.enter("checkpoint")
            if quality := self.validation.quality_of(step):
                tools.checkpoints.rate(step, quality)
            tools.goodput.saved(step)

    def stop_after(self, step: int) -> None:
        """Saves what was done until `step` inclusive, the last one."""
        if self.saved_step == step:
            return
        self.bad_clips.write()
        if self.pending:
            self.fetch(step)
        self.save_logs()
        self.save(step)

    def save_logs(self) -> None:
        """Returns once they have every line so far: no checkpoint is ahead of them."""
        self.tools.metrics.save()
        self.bad_clips.save()

    def save(self, step: int) -> None:
        """Saves a checkpoint."""
        self.tools.goodput.enter("checkpoint")
        data_state = {"step": step, wording.TOTAL: self.setup.schedule.total}
        data_state |= self.identity | self.nonfinite.state()
        self.tools.checkpoints.save(step, self.state, data_state, self.setup.config)
        self.tools.goodput.saved(step)
        self.saved_step = step


# ---------------------------------------------------------------------------------------------
# Before the first step


@contextmanager
def open_tools(setup: Setup, goodput: Goodput) -> Iterator[Tools]:
    """The tools of a run, whose workdir no other process may have open."""
    config, workdir = setup.config, setup.workdir
    with (
        WorkdirLock(workdir) as lock,
        PreemptionHandler() as preemption,
        Watchdog(config.log.watchdog_seconds, workdir) as watchdog,
        Checkpoints(workdir, config.checkpoint.keep, config.checkpoint.every_steps) as checkpoints,
        closing(Metrics(workdir, config)) as metrics,
    ):
        yield Tools(lock, preemption, watchdog, checkpoints, metrics, goodput)


@contextmanager
def open_run(setup: Setup, tools: Tools, validation: Validation, start: Start) -> Iterator[Run]:
    """The run after `start`, with its data, logs and compiled step."""
    config, schedule = setup.config, setup.schedule
    class_names = setup.identity["class_names"] or start.saved.get("class_names")
    bad_clips = open_logs(setup, class_names, tools.metrics, start.step)
    tools.goodput.resume(start.step)
    progress = Progress(
        schedule.total,
        schedule.steps_per_epoch,
        config.train.batch_size,
        start_step=start.step,
        every=config.log.every_steps,
    )
    batches = open_batches(setup, start.step, bad_clips.quarantine)
    tools.goodput.enter("compile")
    with stopped_at_once():
        step_fn = compile_step(setup, start.state)
    with closing(batches), closing(progress), closing(bad_clips), closing(step_fn):
        yield Run(
            setup=setup,
            tools=tools,
            validation=validation,
            bad_clips=bad_clips,
            progress=progress,
            batches=batches,
            step_fn=step_fn,
            nonfinite=NonfiniteSteps(config.train.max_nonfinite, start.saved, tools.checkpoints),
            identity=setup.identity | {"class_names": class_names},
            state=start.state,
            saved_step=start.step,
        )


def stopped_at_once() -> AbstractContextManager[None]:
    """A context for what takes minutes, such as compiling, while there is nothing to save.

    Several hosts go on, and decide together at that step.
    """
    return ended_by_signals_again() if host_count() == 1 else nullcontext()


def restore_or_initialize(
    setup: Setup, checkpoints: Checkpoints, accept_data_change: bool
) -> Start:
    """The latest checkpoint, or a new state at step 0.

    Raises UserError for a checkpoint of other data, unless that is accepted.
    """
    config = setup.config
    restored = checkpoints.restore_latest(abstract_state(config, setup.optimizer, setup.mesh))
    if restored is None:
        class_names = setup.identity["class_names"]
        return Start(0, initial_state(config, setup.optimizer, setup.mesh, class_names), {})
    start = Start(*restored)
    check_data(start.saved, setup.identity, setup.workdir, accept_data_change)
    say(f"going on from step {start.step} of {setup.schedule.total}")
    if line := wording.describe_new_schedule(setup, start.step, start.saved):
        say(line)
    if line := wording.describe_new_validation(setup):
        say(line)
    return start


def keep_earlier_run(workdir: epath.Path) -> None:
    """Moves an earlier run's files aside, for one that starts anew."""
    folder = compute_on_host0(lambda: os.fspath(set_run_aside(workdir) or ""))
    if folder:
        say(f"starting anew; the files of the earlier run are in {folder}")


def check_not_lost(workdir: epath.Path, checkpoints: Checkpoints, validation: Validation) -> None:
    """Raises UserError if the run in the workdir, which has no checkpoints, must have had some."""
    logged = compute_on_host0(lambda: last_logged_step(workdir))
    due = (checkpoints.due(step) or validation.due(step) for step in range(1, logged))
    # The last one that was begun may not have been finished.
    if sum(due) >= 2:
        raise UserError(
            f"{workdir} has the log of a run up to step {logged}, and its checkpoints are gone: "
            f"{workdir / FOLDER} has none; bring them back, use another workdir, or add --fresh "
            "to start anew and keep the earlier files aside"
        )


def check_data(before: Tree, now: Tree, workdir: epath.Path, accepted: bool) -> None:
    """Raises UserError if the run was begun with other data, unless that is accepted.

    before, now: see `splits.data_difference`.
    """
    if difference := splits.data_difference(before, now):
        if not accepted:
            raise UserError(
                f"the run in {workdir} was begun with other data: {difference}; use another "
                "workdir, or add --accept_data_change to go on with these"
            )
        say(f"warning: going on with other data: {difference}")
    validated, validation = before.get("validation"), now["validation"]
    if (
        validated
        and validation
        and (difference := splits.identity_difference(validated, validation))
    ):
        say(
            f"warning: validation has {difference}: its numbers, and which checkpoint is the best, "
            "cannot be compared with those from before"
        )


def announce(setup: Setup, state: Tree) -> None:
    """Says what the run has found and will do."""
    if setup.data.validation is not None:
        warn_of_shared_videos(setup.data.training, setup.data.validation)
    say(f"training on {setup.mesh.size} x {device_name(setup.mesh.devices.flat[0])}")
    say(wording.describe_run(setup))
    say(parameter_overview(setup.config, state["params"], setup.frozen))
    if setup.balance:
        say(setup.balance)


def warn_of_shared_videos(training: Source, validation: Source) -> None:
    """Prints a warning if validation videos are trained on as well."""
    if shared := splits.shared_videos(training, validation):
        say(
            f"warning: {shared} of {len(validation)} videos of config.data.validation are also in "
            "config.data.train, so validation numbers are flattered"
        )


def open_logs(
    setup: Setup, class_names: Sequence[str] | None, metrics: Metrics, start: int
) -> BadClips:
    """Writes the run's config and class names, and drops the lines of later steps from its logs."""
    with raise_on_all_hosts():
        write_config(setup.workdir, setup.config)
        write_class_names(setup.workdir, class_names)
        metrics.rewind(start)
        if setup.config.log.wandb and host_index() == 0:
            metrics.open()  # what it refuses, it should refuse before the compilation
    check_shared(setup.workdir / CONFIG)
    return BadClips(setup.workdir, start)


class StepKind(NamedTuple):
    """Steps that are one program. images: of clips; turn: of `Objective.turns`, by number."""

    images: bool
    turn: int


def kind_of_step(setup: Setup, step: int) -> StepKind:
    """The kind of a step: there are steps of images, and objectives that take turns.

    Images have so few tokens that the first of the objectives is theirs.
    """
    config, source = setup.config, setup.data.training
    images, before = False, step - 1
    if isinstance(source, Mixture) and setup.image_grids:
        groups = config.train.batch_size // config.data.clips_per_grid  # of a step
        first, period = before * groups, plan_groups(config, source)
        number = (first % period if period else first) // groups
        # Turns are counted without the steps of images: else some might fall on these alone.
        images, before = turn_of_step(number, source.image_share)
    return StepKind(images, 0 if images else before % len(setup.objective.turns()))


def grids_of_step(setup: Setup, step: int) -> tuple[Grid, ...]:
    """The grids that a step's clips may have."""
    return setup.image_grids if kind_of_step(setup, step).images else setup.grids


def open_batches(setup: Setup, start: int, quarantine: Quarantine) -> Batches:
    """This host's part of the batches after step `start`."""
    config = setup.config
    all_groups = config.train.batch_size // config.data.clips_per_grid
    return train_batches(
        config,
        setup.data.training,
        start_step=start,
        groups=local_row_indices(setup.mesh, all_groups).tolist(),
        clip_data=setup.data.clip_data,
        texts=objective_class(config).text_arrays(config),
        quarantine=quarantine,
    )


def compile_step(setup: Setup, state: Tree) -> ProfiledStep:
    """The compiled step, on all hosts: a program must begin on all of them within seconds.

    It refuses batches of other shapes, so there is one program for all grids, or one for each of an
    objective's turns, and another one for steps that show images.
    """
    step_fns = {
        StepKind(False, turn): _compiled(setup, state, objective, setup.grids, name)
        for turn, (name, objective) in enumerate(setup.objective.turns().items())
    }
    if setup.image_grids:
        objective = make_objective(setup.config, setup.image_grids, platform_of(setup.mesh))
        first, *_ = objective.turns().values()
        step_fns[StepKind(True, 0)] = _compiled(setup, state, first, setup.image_grids, "images")
    barrier()
    return ProfiledStep(
        lambda step: step_fns[kind_of_step(setup, step)], setup.config, setup.workdir
    )


def _compiled(
    setup: Setup, state: Tree, objective: Objective, grids: tuple[Grid, ...], name: str
) -> Callable[..., tuple[Tree, Tree]]:
    """The compiled step for clips on any of `grids`.

    name: of what it trains, where there are others.
    """
    begin = time.monotonic()
    train_step = make_train_step(setup.config, objective, setup.optimizer, setup.mesh)
    batch = abstract_batch(setup.config, grids, setup.mesh)
    of_what = f" of {name}" if name else ""
    lowered = train_step.lower(state, setup.frozen, batch)
    expected = describe_compile_time(lowered, platform_of(setup.mesh))
    say(f"compiling the training step{of_what}, once: {expected}, unless it is kept from before")
    compiled = lowered.compile()
    say(
        f"1 compiled training step{of_what} for {len(grids)} grids, capacity P={capacity(grids)}, "
        f"in {time.monotonic() - begin:.0f} s"
    )
    return compiled


# ---------------------------------------------------------------------------------------------
# A check of the steps


def check_bad_clips(setup: Setup, step: int, bad: int) -> None:
    """Raises UserError if more clips than `data.max_bad_fraction` were replaced until `step`."""
    config, size = setup.config, setup.config.train.batch_size
    drawn = step * size
    enough = drawn >= min(MIN_CLIPS_BEFORE_ABORT, setup.schedule.steps_per_epoch * size)
    if enough and bad > config.data.max_bad_fraction * drawn:
        raise UserError(
            f"{bad} of {drawn} training clips could not be read, more than "
            f"config.data.max_bad_fraction={config.data.max_bad_fraction}; they are listed in "
            f"{setup.workdir / BAD_CLIPS}"
        )
