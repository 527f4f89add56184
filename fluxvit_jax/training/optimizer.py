"""AdamW with layer-wise learning rates, the cosine schedule and the moving average.

The rules are those of the official fine-tuning code; tests/golden/optim_case.json holds its
parameter groups and schedules.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from fluxvit_jax.config.network import freezing

Tree = Any  # nested dict, the structure of the parameters

FIRST_LAYER = ("cls_token", "pos_embed", "patch_embed")
# The official code decays every tensor of more than one dimension. Its depthwise 1x1x1 kernels have
# five there, but are vectors here, so they are listed by name.
DECAYED_SCALES = ("gpe", "lpe")


def schedule(
    base: float, minimum: float, warmup: float, steps: int, warmup_steps: int
) -> np.ndarray:
    """The learning rate of every step: linear from `warmup` to `base`, then a half cosine.

    The last warm-up step and the first one after it both have `base`. The last step stays one short
    of `minimum`, as in the official scheduler.

    Returns:
        float64 [steps].
    """
    warmup_steps = min(warmup_steps, steps)
    position = np.arange(steps - warmup_steps) / max(1, steps - warmup_steps)
    cosine = minimum + 0.5 * (base - minimum) * (1 + np.cos(np.pi * position))
    return np.concatenate([np.linspace(warmup, base, warmup_steps), cosine])


def floored_schedule(base: float, minimum: float, steps: int, warmup_steps: float) -> np.ndarray:
    """The learning rate of every step: linear from 0 to `base`, then a half cosine to 0.

    It is nowhere below `minimum`. Source: InternVideo2, multi_modality, utils/scheduler.py.

    warmup_steps: need not be whole.

    Returns:
        float64 [steps].
    """
    step = np.arange(steps)
    rising = step / max(1.0, warmup_steps)
    cosine = 0.5 * (1 + np.cos(np.pi * (step - warmup_steps) / max(1.0, steps - warmup_steps)))
    return np.maximum(minimum, base * np.where(step < warmup_steps, rising, cosine))


def layer_ids(params: Tree) -> Tree:
    """The layer of each parameter: embeddings 0, block i is i + 1, the rest the last one.

    The rest includes the position table's convolution (`gpe`).

    Returns:
        the structure of `params` with int64 arrays: [depth, 1, ...] for the stacked blocks,
        scalars otherwise.
    """
    depth = _depth(params)

    def layer_id(path: tuple, leaf: jax.Array) -> np.ndarray:
        branch = path[0].key
        if branch == "blocks":
            return np.arange(1, depth + 1).reshape(depth, *(1,) * (leaf.ndim - 1))
        return np.asarray(0 if branch in FIRST_LAYER else depth + 1)

    return jax.tree_util.tree_map_with_path(layer_id, params)


def learning_rate_scales(params: Tree, layer_decay: float) -> Tree:
    """Factors of the learning rate: `layer_decay` to the power of the number of layers above.

    Returns:
        float32 arrays shaped as `layer_ids`.
    """
    last = _depth(params) + 1
    return jax.tree.map(lambda ids: np.float32(layer_decay ** (last - ids)), layer_ids(params))


def decay_mask(params: Tree) -> Tree:
    """True where weights decay: kernels, and the scales of the 1x1x1 convolutions.

    Never: biases, norms, LayerScale, the class token and the position table.
    """

    def decays(path: tuple, _: jax.Array) -> bool:
        names = [entry.key for entry in path]
        return names[-1] == "kernel" or (names[-1] == "scale" and names[-2] in DECAYED_SCALES)

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
    config: ConfigDict, total_steps: int, params: Tree
) -> optax.GradientTransformation:
    """AdamW as in torch, with a learning rate per layer, after clipping by global norm.

    It is for `Freezing.trained` of the parameters, so what is frozen has no state and no decay.

    Decay is decoupled and scales with the layer's learning rate:
    `p -= rate * scale * (adam + weight_decay * p)`.

    Args:
        config: the whole configuration; `optim` and `train.{epochs,warmup_epochs}` are read.
        total_steps: optimizer steps of the run.
        params: all parameters or their shapes.
    """
    optim = config.optim
    rates = learning_rates(config, total_steps)
    scales = freezing(config).trained(learning_rate_scales(params, optim.layer_decay))
    clip = [optax.clip_by_global_norm(optim.clip_norm)] if optim.clip_norm else []
    return optax.chain(
        *clip,
        optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
        optax.add_decayed_weights(optim.weight_decay, mask=decay_mask),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scales)),
        optax.scale_by_learning_rate(lambda step: jnp.asarray(rates, jnp.float32)[step]),
    )


def learning_rates(config: ConfigDict, total_steps: int) -> np.ndarray:
    """The schedule of a run, before the layers' scales: float64 [total_steps]."""
    if config.optim.schedule == "cosine_floor":
        return floored_schedule(
            config.optim.learning_rate,
            config.optim.min_learning_rate,
            total_steps,
            config.train.warmup_epochs * total_steps / config.train.epochs,
        )
    warmup_steps = config.train.warmup_epochs * total_steps / config.train.epochs
    return schedule(
        config.optim.learning_rate,
        config.optim.min_learning_rate,
        config.optim.warmup_learning_rate,
        total_steps,
        int(round(warmup_steps, 6)),  # 7 of 6.999999999999999, whatever the number of epochs
    )


def ema_update(average: Tree, params: Tree, decay: float) -> Tree:
    """One step of the exponential moving average: `decay * average + (1 - decay) * params`."""
    return optax.incremental_update(params, average, 1 - decay)


def _depth(params: Tree) -> int:
    return jax.tree.leaves(params["blocks"])[0].shape[0]
