"""The training state {"params", "opt_state", "step", "bad_clips"[, "ema"]}, sharded over a mesh."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fluxvit_jax.checkpoints import checkpointer
from fluxvit_jax.config.network import freezing, model_config
from fluxvit_jax.distributed import partition_rules
from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.mesh import device_put_global
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import fluxvit
from fluxvit_jax.objectives.base import objective_class
from fluxvit_jax.training import init_from

Tree = dict[str, Any]


def abstract_params(config: ConfigDict) -> Tree:
    """Shapes of the trained parameters."""
    return jax.eval_shape(_fresh(config))


def abstract_state(config: ConfigDict, optimizer: optax.GradientTransformation, mesh: Mesh) -> Tree:
    """Shapes and shardings of the state."""
    shapes = jax.eval_shape(_state_maker(config, optimizer), abstract_params(config))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        partition_rules.shardings(shapes, mesh, objective_class(config).partition_rules),
    )


def check_params_divide(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError if a side of the mesh does not divide the parameters split over it."""
    network, rules = f"FluxViT-{config.model.variant}", objective_class(config).partition_rules
    partition_rules.check(abstract_params(config), mesh, network, rules)


def initial_state(
    config: ConfigDict,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    class_names: Sequence[str] | None = None,
) -> Tree:
    """The state before the first step, with the weights of `train.init_from` if that is given.

    class_names: of the classes to train, if known; a classifier for other ones starts afresh.

    Raises UserError for weights that do not fit.
    """
    expected, rules = abstract_params(config), objective_class(config).partition_rules
    shardings = partition_rules.shardings(expected, mesh, rules)
    initial = objective_class(config).load_initial(config)
    own = {name: expected[name] for name in initial}
    checkpointer.check_fit(initial, own, config.train.init_from)
    if initial or config.train.init_from:
        params = device_put_global(_start_from(config, class_names) | initial, shardings)
    else:
        params = jax.jit(_fresh(config), out_shardings=shardings)()
    make = _state_maker(config, optimizer)
    out = partition_rules.shardings(jax.eval_shape(make, expected), mesh, rules)
    return jax.jit(make, out_shardings=out)(params)


def parameter_overview(config: ConfigDict, params: Tree, frozen: Tree) -> str:
    """Number of parameters by top-level part and in total, trained and frozen, in a few lines.

    params: all that the state holds; frozen: of other networks.
    """
    trained, fixed = (
        jax.eval_shape(part, params) for part in (freezing(config).trained, freezing(config).frozen)
    )
    counts = {"trained": _counts(trained), "frozen": _counts(fixed | frozen)}
    totals = {kind: sum(parts.values()) for kind, parts in counts.items()}
    rows = [(kind, name, n) for kind, parts in counts.items() for name, n in parts.items()]
    lines = [f"  {name:<20} {n:>15,}{'  frozen' * (kind == 'frozen')}" for kind, name, n in rows]
    total = f"{sum(totals.values()):,} ({totals['trained']:,} trained, {totals['frozen']:,} frozen)"
    return "\n".join([f"parameters: {total}", *lines])


def _counts(tree: Tree) -> dict[str, int]:
    return {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in tree.items()}


def _fresh(config: ConfigDict) -> Callable[[], Tree]:
    """A function that makes the parameters that the seed gives, for any sharding."""
    model, objective = model_config(config), objective_class(config)
    # Steps count from 0, so no step uses this key.
    key = jax.random.fold_in(jax.random.key(config.seed), np.uint32(2**32 - 1))

    def make() -> Tree:
        params = fluxvit.init_params(model, key)
        params |= objective.init_params(config, jax.random.fold_in(key, 1))
        # Drop weak types; otherwise the second step has other input types and recompiles.
        return jax.tree.map(lambda x: jnp.asarray(x, x.dtype), params)

    return make


def _start_from(config: ConfigDict, class_names: Sequence[str] | None) -> Tree:
    """Numpy arrays: the weights of `train.init_from`, if any, adapted; prints the adaptations."""
    model, source = model_config(config), config.train.init_from
    with jax.default_device(jax.local_devices()[0]):
        fresh = jax.tree.map(np.asarray, jax.jit(_fresh(config))())
    if not source:
        return fresh
    loaded = init_from.load(source, model)
    if note := _untrained_pooling(config, loaded.trained_heads):
        say(note)
    network = {name: fresh[name] for name in loaded.params}
    params, notes = init_from.fit(loaded, model, network, source, class_names)
    say(f"starting from {source}")
    for note in notes:
        say(note)
    return fresh | params


def _untrained_pooling(config: ConfigDict, heads: int) -> str:
    """What to say if the weights to start from were trained at `heads` budgets, and these are more.

    Raises UserError if pooling that they did not train is frozen as it is.
    """
    source, budgets = config.train.init_from, config.train.budgets
    if len(budgets) <= heads or not objective_class(config).pools:
        return ""
    others = ", ".join(map(str, budgets[heads:]))
    untrained = (
        f"the pooling at {others} tokens was not trained with it, which had {heads} of "
        f"{len(budgets)} budgets"
    )
    if "pool" in freezing(config).names:
        raise UserError(
            f"config.train.freeze: {config.train.freeze} would keep all pooling of {source}, but "
            f"{untrained}; leave the rest out of train.budgets, or freeze the backbone alone"
        )
    return f"{source}: {untrained}"


def _state_maker(
    config: ConfigDict, optimizer: optax.GradientTransformation
) -> Callable[[Tree], Tree]:
    def make(params: Tree) -> Tree:
        state = {
            "params": params,
            "opt_state": optimizer.init(freezing(config).trained(params)),
            "step": jnp.int32(0),
            "bad_clips": jnp.int32(0),
        }
        # A copy: a buffer that the state holds twice cannot be donated to the step.
        return state | {"ema": jax.tree.map(jnp.copy, params)} if config.train.ema_decay else state

    return make
