"""The training step: one compiled program from (state, batch) to (state, what was measured)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fluxvit_jax import distill, optim, parallel
from fluxvit_jax.budgets import Grid, bounds, capacity
from fluxvit_jax.config import is_distillation, model_config
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.fluxvit import PATCH_VALUES
from fluxvit_jax.models.selection import GridLimits
from fluxvit_jax.objectives import Objective
from fluxvit_jax.objectives.distillation import CACHED
from fluxvit_jax.objectives.supervised import Supervised
from fluxvit_jax.state import abstract_frozen, abstract_state

Tree = dict[str, Any]


def make_objective(config: ConfigDict, grids: tuple[Grid, ...], platform: str) -> Objective:
    """The loss that `config.train` describes, for clips on any of `grids`.

    platform: what it will run on, "cpu", "gpu" or "tpu"; chooses how attention is computed.
    """
    train = config.train
    limits = GridLimits(*bounds(grids), min(grid.tokens for grid in grids))
    if is_distillation(config):
        return distill.make_objective(config, limits, platform)
    return Supervised(
        graph=fluxvit.structure(model_config(config, platform)),
        limits=limits,
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
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]:
    """The compiled step: (state, frozen, batch) -> (state, scalars). The old state is given up.

    state, frozen: as `state.abstract_state` and `state.abstract_frozen` lay them out; batch: as
    `device_batch` makes it, cut by clip.
    Measured are the objective's terms, "gradient_norm" before clipping, both float32, "bad_clips",
    how many were replaced in the run so far, and "stop", the highest of the batch.
    """
    model = model_config(config)
    group, parts = config.data.grid_group, config.train.accumulate
    places, frozen_places = (
        jax.tree.map(lambda x: x.sharding, tree)
        for tree in (abstract_state(config, optimizer, mesh), abstract_frozen(config, mesh))
    )

    def of_clips(networks: tuple[Tree, Tree], clips: Tree) -> tuple[Tree, Tree]:
        params, frozen = networks
        gradients, measured = accumulate(
            objective, fluxvit.for_passes(params, model), frozen, clips, group, parts
        )
        return fluxvit.stack_layers(gradients), measured

    def train_step(state: Tree, frozen: Tree, batch: Tree) -> tuple[Tree, Tree]:
        params = state["params"]
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        clips = {name: own for name, own in batch.items() if name not in ("bad", "stop")}
        clips["key"] = jax.random.split(key, len(batch["label"]))
        gradients, measured = parallel.mean_over_data(of_clips, mesh)((params, frozen), clips)
        updates, opt_state = optimizer.update(gradients, state["opt_state"], params)
        new = {
            "params": optax.apply_updates(params, updates),
            "opt_state": opt_state,
            "step": state["step"] + 1,
            "bad_clips": state["bad_clips"] + jnp.sum(batch["bad"], dtype=jnp.int32),
        }
        if "ema" in state:
            new["ema"] = optim.ema_update(state["ema"], new["params"], config.train.ema)
        return new, measured | {
            "gradient_norm": optax.tree.norm(gradients),
            "bad_clips": new["bad_clips"],
            "stop": parallel.highest(batch["stop"], mesh),
        }

    return jax.jit(
        parallel.on_mesh(train_step, mesh),
        in_shardings=(places, frozen_places, parallel.by_clip(mesh)),
        out_shardings=(places, parallel.replicated(mesh)),
        donate_argnums=0,
        compiler_options=parallel.compiler_options(mesh),
    )


def accumulate(
    objective: Objective, params: Tree, frozen: Tree, batch: Tree, group: int, parts: int
) -> tuple[Tree, Tree]:
    """Mean gradients and terms over `parts` parts of a batch, one part after another.

    batch: arrays [B, ...]. Groups of `group` clips stay whole: part i has each `parts`-th of them,
    from the i-th on, so that a batch cut over devices is cut into parts where it lies.
    """
    if parts == 1:
        return objective.gradients(params, frozen, batch)

    def cut(x: jax.Array) -> jax.Array:
        """[B, ...] -> [parts, B / parts, ...]."""
        grouped = x.reshape(-1, parts, group, *x.shape[1:])
        return jnp.moveaxis(grouped, 1, 0).reshape(parts, -1, *x.shape[1:])

    def add(total: Tree, part: Tree) -> tuple[Tree, None]:
        own = objective.gradients(params, frozen, part)
        return jax.tree.map(lambda t, x: t + x / parts, total, own), None

    batches = jax.tree.map(cut, batch)
    first = jax.tree.map(lambda x: x[0], batches)
    shapes = jax.eval_shape(objective.gradients, params, frozen, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, batches)[0]


def device_batch(batch: dict[str, np.ndarray], stop: int = 0) -> dict[str, np.ndarray]:
    """What the step needs of a host's part of a batch, b clips.

    bad: bool [b], which clips stand for unreadable ones; stop: int32 [b], above 0 where this host
    has been told to stop, so that all hosts hear of it at the same step.
    """
    clips = (name for name in ("patches", "grid", "label", *CACHED) if name in batch)
    return {name: batch[name] for name in clips} | {
        "bad": batch["failure"] != "",
        "stop": np.full(len(batch["label"]), stop, np.int32),
    }


def abstract_batch(config: ConfigDict, grids: tuple[Grid, ...], mesh: Mesh) -> Tree:
    """Shapes of a global batch as `device_batch` makes it, and where it lies."""
    B, P = config.train.batch_size, capacity(grids)
    shapes = {
        "patches": ((B, P, PATCH_VALUES), np.uint8),
        "grid": ((B, 3), np.int32),
        "label": ((B,), np.int32),
        "bad": ((B,), np.bool_),
        "stop": ((B,), np.int32),
    }
    if is_distillation(config) and config.distill.cache:
        fields = distill.lesson_fields(config)
        shapes |= {name: ((B, *shape), np.dtype(dtype)) for name, (shape, dtype) in fields.items()}
    return {
        name: jax.ShapeDtypeStruct(*own, sharding=parallel.by_clip(mesh))
        for name, own in shapes.items()
    }
