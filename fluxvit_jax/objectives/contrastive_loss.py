"""The symmetric contrastive loss of Flux-CLIP, over all clips and captions of a global batch.

Source: InternVideo2, multi_modality, models/criterions.py (vtc_loss). Its gather returns each rank
its own part of the gradient, so that under DDP's mean the encoders get 1/world of the gradient and
the temperature all of it. Under `jax.jit` the batch is global, so gradients here are the true ones.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from fluxvit_jax.models.arrays import Array
from fluxvit_jax.models.blocks import l2_normalize


def contrastive_loss(
    videos: Float[Array, "B D"],
    texts: Float[Array, "B D"],
    temperature: Float[Array, ""],
    identity: Int[Array, "B *I"],
) -> Float[Array, ""]:
    """The mean of both directions' cross-entropy, float32.

    videos, texts: vectors of pairs, not normalized; temperature: divides the cosines; identity:
    of what a pair shows, in one number or several. Pairs with the same one are positives of each
    other, with equal shares.
    """
    v, t = (l2_normalize(x.astype(jnp.float32)) for x in (videos, texts))
    logits = jnp.matmul(v, t.T, precision="highest") / temperature
    B = len(identity)
    same = (identity[:, None] == identity).reshape(B, B, -1).all(axis=-1).astype(jnp.float32)
    targets = same / jnp.sum(same, axis=1, keepdims=True)

    def cross_entropy(logits: jax.Array) -> jax.Array:
        return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=1))

    return (cross_entropy(logits) + cross_entropy(logits.T)) / 2
