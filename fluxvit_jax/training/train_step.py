"""The training step: one compiled program (state, frozen, batch) -> (state, scalars)."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.stages import Wrapped
from ml_collections import ConfigDict
from numpy.typing import DTypeLike

from fluxvit_jax.config.network import freezing, model_config
from fluxvit_jax.data.multi_label import multi_hot_classes
from fluxvit_jax.distributed.mesh import (
    batch_sharding,
    compiler_options,
    data_parallel_mean,
    global_max,
    local_row_indices,
    replicated,
    traced_on_mesh,
)
from fluxvit_jax.grids import Grid, bounds, capacity
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.arrays import zeros_of
from fluxvit_jax.models.fluxvit import PATCH_VALUES
from fluxvit_jax.models.token_selection import GridLimits
from fluxvit_jax.objectives.base import Objective, objective_class
from fluxvit_jax.objectives.micro_batches import split
from fluxvit_jax.training.optimizer import ema_update
from fluxvit_jax.training.train_state import abstract_state

Tree = dict[str, Any]

COUNTS = ("step", "bad_clips")  # of the state; they go on in a step that is skipped
NO_BATCH = 1 << 10  # more than any exit status; added to "stop" by a host that has no batch


def make_objective(config: ConfigDict, grids: tuple[Grid, ...], platform: str) -> Objective:
    """The objective that `config.train` describes, for clips on any of `grids`.

    platform: "cpu", "gpu" or "tpu", which selects the attention kernel.
    """
    limits = GridLimits(*bounds(grids), min(grid.tokens for grid in grids))
    return objective_class(config).from_config(config, limits, platform)


def make_train_step(
    config: ConfigDict,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> Wrapped:
    """The jitted step: (state, frozen, batch) -> (state, scalars). The old state is donated.

    state, frozen: with the shardings of `train_state.abstract_state` and
    `Objective.abstract_frozen`; batch: as `device_batch` makes it, split by clip.

    Scalars are the objective's terms, "gradient_norm" before clipping, "param_norm" and
    "update_norm" after the step, all float32; "bad_clips", the number of replaced clips in the run
    so far; "skipped", whether the step changed nothing because a norm or the loss was not a finite
    number; and "stop", the maximum over the batch. From `NO_BATCH` on, some host had no batch, and
    the step has changed nothing at all.
    """
    state_shardings, frozen_shardings = (
        jax.tree.map(lambda x: x.sharding, tree)
        for tree in (
            abstract_state(config, optimizer, mesh),
            objective.abstract_frozen(config, mesh),
        )
    )
    return jax.jit(
        traced_on_mesh(_step_function(config, objective, optimizer, mesh), mesh),
        in_shardings=(state_shardings, frozen_shardings, batch_sharding(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )


def _step_function(
    config: ConfigDict,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]:
    """What `make_train_step` compiles."""
    part = freezing(config)
    value_and_grad = _value_and_grad(config, objective, mesh)

    def train_step(state: Tree, frozen: Tree, batch: Tree) -> tuple[Tree, Tree]:
        params = state["params"]
        clips = _clips_with_keys(config, state["step"], batch)
        trained = part.trained(params)
        gradients, terms = value_and_grad((trained, part.frozen(params), frozen), clips)
        stop = global_max(batch["stop"], mesh)
        done = stop < NO_BATCH
        updates, opt_state = optimizer.update(gradients, state["opt_state"], trained)
        trained = objective.constrained(optax.apply_updates(trained, updates))
        new = {
            "params": part.replaced(params, trained),
            "opt_state": opt_state,
            "step": state["step"] + done.astype(jnp.int32),
            "bad_clips": state["bad_clips"] + jnp.sum(batch["bad"] & done, dtype=jnp.int32),
        }
        if "ema" in state:
            average = ema_update(part.trained(state["ema"]), trained, config.train.ema_decay)
            new["ema"] = part.replaced(state["ema"], average)
        norms = {
            "gradient_norm": optax.tree.norm(gradients),
            "update_norm": optax.tree.norm(updates),
        }
        usable = jnp.isfinite(jnp.stack([terms["loss"], *norms.values()])).all()
        new = _changed_where(usable & done, state, new)
        return new, terms | norms | {
            "param_norm": optax.tree.norm(new["params"]),
            "bad_clips": new["bad_clips"],
            "skipped": ~usable & done,
            "stop": stop,
        }

    return train_step


def _clips_with_keys(config: ConfigDict, step: jax.Array, batch: Tree) -> Tree:
    """What the objective gets of a batch, with a random key for each clip."""
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    clips = {name: x for name, x in batch.items() if name not in ("bad", "stop")}
    clips["key"] = jax.random.split(key, len(batch["label"]))
    return clips


def _changed_where(usable: jax.Array, state: Tree, new: Tree) -> Tree:
    """The new state if the step is usable, a bool [], else the old one with the new `COUNTS`."""
    changes = partial(jnp.where, usable)
    return {
        name: tree if name in COUNTS else jax.tree.map(changes, tree, state[name])
        for name, tree in new.items()
    }


def _value_and_grad(
    config: ConfigDict, objective: Objective, mesh: Mesh
) -> Callable[[tuple[Tree, ...], Tree], tuple[Tree, Tree]]:
    """The objective's mean gradients and terms: (networks, clips) -> (gradients, terms).

    networks: the trained and the frozen part of the state's parameters, and other networks; clips:
    of the whole batch, split over the devices.
    """
    model = model_config(config)
    group, parts = config.data.clips_per_grid, config.train.grad_accum_steps

    def local_value_and_grad(networks: tuple[Tree, ...], clips: Tree) -> tuple[Tree, Tree]:
        trained, fixed = (fluxvit.prepare_params(params, model) for params in networks[:2])
        frozen = networks[2] | fixed
        gradients, terms = accumulate(objective, trained, frozen, clips, group, parts)
        return fluxvit.stack_layers(gradients), terms

    # A loss over the whole batch sees all clips at once; others are averaged over their parts.
    if objective.whole_batch:
        return local_value_and_grad
    return data_parallel_mean(local_value_and_grad, mesh)


def accumulate(
    objective: Objective, params: Tree, frozen: Tree, batch: Tree, group: int, parts: int
) -> tuple[Tree, Tree]:
    """Mean gradients and terms over `parts` micro-batches, one after another.

    batch: arrays [B, ...], in groups of `group`. A loss over the whole batch sees to its parts
    itself: see `micro_batches.mapped`.
    """
    if parts == 1 or objective.whole_batch:
        return objective.value_and_grad(params, frozen, batch)

    def add(total: Tree, part: Tree) -> tuple[Tree, None]:
        result = objective.value_and_grad(params, frozen, part)
        return jax.tree.map(lambda t, x: t + x / parts, total, result), None

    batches = split(batch, parts, group)
    first = jax.tree.map(lambda x: x[0], batches)
    zeros = zeros_of(objective.value_and_grad, params, frozen, first)
    return jax.lax.scan(add, zeros, batches)[0]


def device_batch(
    batch: dict[str, np.ndarray], stop: int = 0, fields: Iterable[str] = ()
) -> dict[str, np.ndarray]:
    """The step's inputs from a host's part of a batch, b clips.

    fields: the names of `Objective.clip_fields`.

    Adds bad: bool [b], clips that replace unreadable ones; and stop: int32 [b], above 0 if this
    host got a signal to stop, so that all hosts know of it at the same step.
    """
    return {name: batch[name] for name in ("patches", "grid", "label", *fields)} | {
        "bad": batch["failure"] != "",
        "stop": np.full(len(batch["label"]), stop, np.int32),
    }


def empty_batch(config: ConfigDict, grids: tuple[Grid, ...], mesh: Mesh, stop: int) -> Tree:
    """What a host puts in, as `device_batch`, if it has to stop before it has its batch.

    grids: those of the step, on all hosts; stop: above 0.
    """
    rows = len(local_row_indices(mesh, config.train.batch_size))
    batch = {
        name: np.zeros((rows, *x.shape[1:]), x.dtype)
        for name, x in abstract_batch(config, grids, mesh).items()
    }
    batch["grid"][:] = grids[0]
    batch["stop"][:] = NO_BATCH + stop
    return batch


def abstract_batch(config: ConfigDict, grids: tuple[Grid, ...], mesh: Mesh) -> Tree:
    """Shapes and shardings of a global batch as `device_batch` makes it."""
    B, P, classes = config.train.batch_size, capacity(grids), multi_hot_classes(config)
    shapes: dict[str, tuple[tuple[int, ...], DTypeLike]] = {
        "patches": ((B, P, PATCH_VALUES), np.uint8),
        "grid": ((B, 3), np.int32),
        "label": ((B, classes), np.uint8) if classes else ((B,), np.int32),
        "bad": ((B,), np.bool_),
        "stop": ((B,), np.int32),
    }
    fields = objective_class(config).clip_fields(config)
    shapes |= {name: ((B, *shape), dtype) for name, (shape, dtype) in fields.items()}
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for name, (shape, dtype) in shapes.items()
    }
