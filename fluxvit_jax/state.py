"""The training state: {"params", "opt_state", "step", "bad_clips"[, "ema"]}, cut over a mesh.

Beside it what is frozen: the parameters of a teacher, if there is one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fluxvit_jax import distill, parallel, sharding, weights
from fluxvit_jax.config import asks_teacher, is_distillation, model_config
from fluxvit_jax.models import fluxvit
from fluxvit_jax.objectives.distillation import DECODERS

Tree = dict[str, Any]


def abstract_params(config: ConfigDict) -> Tree:
    """Shapes of the trained parameters."""
    return jax.eval_shape(_fresh(config))


def abstract_state(config: ConfigDict, optimizer: optax.GradientTransformation, mesh: Mesh) -> Tree:
    """Shapes of the state, and where it lies."""
    shapes = jax.eval_shape(_state_maker(config, optimizer), abstract_params(config))
    return jax.tree.map(
        lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own),
        shapes,
        sharding.shardings(shapes, mesh),
    )


def initial_state(config: ConfigDict, optimizer: optax.GradientTransformation, mesh: Mesh) -> Tree:
    """The state before the first step, with the weights of `train.init_from` if that is given.

    Raises UserError for weights that do not fit.
    """
    expected = abstract_params(config)
    places = sharding.shardings(expected, mesh)
    if config.train.init_from:
        params = parallel.place(_start_from(config), places)
    else:
        params = jax.jit(_fresh(config), out_shardings=places)()
    make = _state_maker(config, optimizer)
    out = sharding.shardings(jax.eval_shape(make, expected), mesh)
    return jax.jit(make, out_shardings=out)(params)


def abstract_frozen(config: ConfigDict, mesh: Mesh) -> Tree:
    """Shapes of what is frozen, and where it lies."""
    return distill.abstract_teacher(config, mesh) if asks_teacher(config) else {}


def frozen_parameters(config: ConfigDict, mesh: Mesh) -> Tree:
    """What is frozen. Raises UserError for weights that do not fit."""
    return distill.load_teacher(config, mesh) if asks_teacher(config) else {}


def _fresh(config: ConfigDict) -> Callable[[], Tree]:
    """Makes the parameters that the seed gives, wherever they will lie."""
    model = model_config(config)
    # Steps count from 0, so this key is none of theirs.
    key = jax.random.fold_in(jax.random.key(config.seed), np.uint32(2**32 - 1))

    def make() -> Tree:
        params = fluxvit.initialise(model, key)
        if is_distillation(config):
            params |= distill.fresh_decoders(config, jax.random.fold_in(key, 1))
        # With types as firm as those of what a step returns, or that would be compiled twice.
        return jax.tree.map(lambda x: jnp.asarray(x, x.dtype), params)

    return make


def _start_from(config: ConfigDict) -> Tree:
    """The weights of `train.init_from` as numpy arrays, made to fit; says what was changed."""
    model, source = model_config(config), config.train.init_from
    loaded, grid = weights.load(source, model)
    with jax.default_device(jax.local_devices()[0]):
        fresh = jax.tree.map(np.asarray, jax.jit(_fresh(config))())
    network = {name: own for name, own in fresh.items() if name != DECODERS}
    params, notes = weights.fit(loaded, grid, model, network, source)
    parallel.say(f"starting from {source}")
    for note in notes:
        parallel.say(note)
    return fresh | params


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
