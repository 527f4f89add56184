"""Training: `train` is the one loop, read from top to bottom; below it are its parts.

A run is a function of its config and data. Everything random is drawn from the seed and the number
of a step or sample, and a checkpoint holds the rest, so the same command goes on where a workdir
stopped, and leaves the same numbers behind as a run that was never stopped.
"""

import math
import os
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fluxvit_jax import optim, parallel, weights
from fluxvit_jax.budgets import Grid, bounds, capacity
from fluxvit_jax.checkpoint import Checkpoints
from fluxvit_jax.config import admissible_grids, model_config, validate_for_training
from fluxvit_jax.data.annotations import Source, open_source, training_part
from fluxvit_jax.data.pipeline import train_batches
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluate import evaluate
from fluxvit_jax.metrics import Metrics, Progress
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.selection import GridLimits
from fluxvit_jax.objectives.supervised import Supervised
from fluxvit_jax.workdir import BAD_CLIPS, BadClips, check_workdir, noted, write_config

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
    validate_for_training(config)
    workdir = Path(workdir)
    check_workdir(workdir, config)
    source = training_part(
        open_source(config.data.train, config.data.root, config.model.classes), config.data.held_out
    )
    validation = _open_validation(config)
    mesh = parallel.data_mesh()
    check_batch_size(config, mesh.size)
    length = run_length(config, len(source))
    grids = admissible_grids(config)

    objective = make_objective(config, grids)
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
        owed = (
            validation is not None
            and length.evaluates_at(start)
            and not noted(workdir, start, VALIDATION)
        )
        if start == length.total and not owed:
            parallel.say(f"the run in {workdir} is finished: all {length.total} steps are done")
            return 0
        write_config(workdir, config)
        metrics.rewind(start)
        bad_clips = BadClips(workdir, start)

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
            host_index=parallel.host_index(),
            host_count=parallel.host_count(),
        )

        def validate(step: int) -> dict[str, float] | None:
            """Evaluates the model (its average, if kept); what chooses the best checkpoint."""
            params = state.get("ema", state["params"])
            with progress.paused():
                evaluation = evaluate(params, config, validation, mesh, interruption.happened)
            if evaluation is None:
                return None
            scalars = evaluation.scalars()
            metrics.write(step, VALIDATION, scalars)
            parallel.say(f"step {step}: {', '.join(f'{k} {v:.4g}' for k, v in scalars.items())}")
            return {"top1": scalars[f"top1_{config.eval.settings[0][0]}"]}

        with closing(batches), closing(progress):
            if owed:
                validate(start)
            saved = start
            pending, before = [], None  # measured by the latest steps, still on the devices
            for step in range(start + 1, length.total + 1):
                if interruption.happened() and saved == step - 1:
                    break
                batch = next(batches)
                bad_clips.note(step, batch["failure"])
                placed = parallel.put(device_batch(batch), mesh)
                with jax.transfer_guard("disallow"):
                    state, measured = train_step(state, placed)
                jax.block_until_ready(before)  # batches must not pile up on the devices
                before = measured
                pending.append(measured)

                last = step == length.total
                log = step % config.log.every_steps == 0 or last
                evaluating = validation is not None and length.evaluates_at(step)
                saving = checkpoints.due(step) or evaluating or last or interruption.happened()
                if log or saving:
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
                    position = batches.state() | {"videos": len(source)}
                    checkpoints.save(step, state, position, config, quality)
                    saved = step
        if interruption.happened():
            checkpoints.wait()
            parallel.say(f"stopped at step {saved}; the same command goes on from there")
        return interruption.status


# ---------------------------------------------------------------------------------------------
# The step


def make_objective(config: ConfigDict, grids: tuple[Grid, ...]) -> Supervised:
    """The loss that `config.train` describes, for clips on any of `grids`."""
    train = config.train
    return Supervised(
        graph=fluxvit.structure(model_config(config)),
        limits=GridLimits(*bounds(grids), min(grid.tokens for grid in grids)),
        budgets=tuple(train.budgets),
        classes=config.model.classes,
        group=config.data.grid_group,
        align=train.align,
        label_smoothing=train.label_smoothing,
        mixup=train.mixup,
        cutmix=train.cutmix,
        mixup_probability=train.mixup_probability,
        erase=train.erase,
        dtype=config.model.dtype,
        drop_path=config.model.drop_path > 0,
        rounding=config.model.selector.rounding,
        selector=config.model.selector.kind,
    )


def make_train_step(
    config: ConfigDict,
    objective: Supervised,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> Callable[[Tree, Tree], tuple[Tree, Tree]]:
    """The compiled step: (state, batch) -> (state, float32 scalars). The old state is given up.

    batch: as `device_batch` makes it, cut over the devices. Measured are the objective's terms,
    "gradient_norm" before clipping, and "bad_clips", how many were replaced in the run so far.
    """
    group, parts = config.data.grid_group, config.train.accumulate

    def train_step(state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        params = state["params"]
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        clips = {name: batch[name] for name in ("patches", "grid", "label")}
        gradients, measured = accumulate(objective, params, clips, key, group, parts)
        updates, opt_state = optimizer.update(gradients, state["opt_state"], params)
        new = {
            "params": optax.apply_updates(params, updates),
            "opt_state": opt_state,
            "step": state["step"] + 1,
            "bad_clips": state["bad_clips"] + jnp.sum(batch["bad"], dtype=jnp.int32),
        }
        if "ema" in state:
            new["ema"] = optim.ema_update(state["ema"], new["params"], config.train.ema)
        about = {"gradient_norm": optax.tree.norm(gradients), "bad_clips": new["bad_clips"]}
        return new, measured | about

    everywhere = parallel.replicated(mesh)
    return jax.jit(
        train_step,
        in_shardings=(everywhere, parallel.by_clip(mesh)),
        out_shardings=everywhere,
        donate_argnums=0,
    )


def accumulate(
    objective: Supervised, params: Tree, batch: Tree, key: jax.Array, group: int, parts: int
) -> tuple[Tree, Tree]:
    """Mean gradients and terms over `parts` parts of a batch, one part after another.

    batch: arrays [B, ...]. Groups of `group` clips stay whole: part i has each `parts`-th of them,
    from the i-th on, so that a batch cut over devices is cut into parts where it lies.
    """
    if parts == 1:
        return objective.gradients(params, batch, key)

    def cut(x: jax.Array) -> jax.Array:
        """[B, ...] -> [parts, B / parts, ...]."""
        grouped = x.reshape(-1, parts, group, *x.shape[1:])
        return jnp.moveaxis(grouped, 1, 0).reshape(parts, -1, *x.shape[1:])

    def add(total: Tree, part: Tree) -> tuple[Tree, None]:
        own = objective.gradients(params, part["batch"], part["key"])
        return jax.tree.map(lambda t, x: t + x / parts, total, own), None

    parts_of = {"batch": jax.tree.map(cut, batch), "key": jax.random.split(key, parts)}
    first = jax.tree.map(lambda x: x[0], parts_of)
    shapes = jax.eval_shape(objective.gradients, params, first["batch"], first["key"])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, parts_of)[0]


def device_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the step needs of a batch; bad: bool [b], which clips stand for unreadable ones."""
    return {name: batch[name] for name in ("patches", "grid", "label")} | {
        "bad": batch["failure"] != ""
    }


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


# ---------------------------------------------------------------------------------------------
# The state: {"params", "opt_state", "step", "bad_clips"[, "ema"]}


def abstract_params(config: ConfigDict) -> Tree:
    """Shapes of the parameters."""
    model = model_config(config)
    return jax.eval_shape(lambda: fluxvit.initialise(model, jax.random.key(0)))


def abstract_state(config: ConfigDict, optimizer: optax.GradientTransformation, mesh: Mesh) -> Tree:
    """Shapes of the state, and where it lies."""
    shapes = jax.eval_shape(_state_maker(config, optimizer), abstract_params(config))
    everywhere = parallel.replicated(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes
    )


def initial_state(config: ConfigDict, optimizer: optax.GradientTransformation, mesh: Mesh) -> Tree:
    """The state before the first step, with the weights of `train.init_from` if that is given.

    Raises UserError for weights that do not fit.
    """
    model = model_config(config)
    # Steps count from 0, so this key is none of theirs.
    key = jax.random.fold_in(jax.random.key(config.seed), np.uint32(2**32 - 1))
    params = jax.jit(lambda key: fluxvit.initialise(model, key))(key)
    if source := config.train.init_from:
        loaded, grid = weights.load(source, model)
        params, notes = weights.fit(loaded, grid, model, params, source)
        parallel.say(f"starting from {source}")
        for note in notes:
            parallel.say(note)
    everywhere = parallel.replicated(mesh)
    params = jax.device_put(jax.tree.map(np.asarray, params), everywhere)
    return jax.jit(_state_maker(config, optimizer), out_shardings=everywhere)(params)


def _state_maker(
    config: ConfigDict, optimizer: optax.GradientTransformation
) -> Callable[[Tree], Tree]:
    def make(params: Tree) -> Tree:
        state = {
            "params": params,
            "opt_state": optimizer.init(params),
            "step": jnp.int32(0),
            "bad_clips": jnp.int32(0),
        }
        # Copied: a buffer that the state holds twice cannot be given up to the step.
        return state | {"ema": jax.tree.map(jnp.copy, params)} if config.train.ema else state

    return make


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


def check_batch_size(config: ConfigDict, devices: int) -> None:
    """Raises UserError unless every device gets whole groups in every part of a batch."""
    group, parts, size = config.data.grid_group, config.train.accumulate, config.train.batch_size
    unit = group * parts * devices
    if size % unit:
        raise UserError(
            f"config.train.batch_size: {size} clips do not split into groups of "
            f"data.grid_group={group} on each of {devices} devices in each of "
            f"train.accumulate={parts} parts; the nearest that does is "
            f"{max(1, round(size / unit)) * unit}"
        )


def check_videos(before: int, source: Source, workdir: Path) -> None:
    """Raises UserError if the run was begun with another number of videos than `source` has."""
    if before != len(source):
        raise UserError(
            f"the run in {workdir} was begun with {before} videos to train on, now there are "
            f"{len(source)}; use another workdir"
        )


def check_bad_clips(
    config: ConfigDict, length: RunLength, step: int, bad: int, workdir: Path
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


class Interruption:
    """Ctrl-C and SIGTERM as a question that the loop asks; a second one acts at once."""

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.status = 0  # the exit status: 128 + signal, once one has come
        self._before: dict[int, Any] = {}

    def happened(self) -> bool:
        return self.status != 0

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self.status = 128 + number
        self.__exit__()
        parallel.say("stopping after this step; once more ends the program at once")


def _open_validation(config: ConfigDict) -> Source | None:
    if config.data.validation:
        return open_source(config.data.validation, config.data.root, config.model.classes)
    parallel.say("no config.data.validation: the model is not evaluated on the way")
    return None
