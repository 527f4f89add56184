"""How far a student's features are from its teacher's."""

import jax
import jax.numpy as jnp

from fluxvit_jax.models.layers import l2_normalise


def distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The mean of 2 - 2 cos, from 0 to 4, over all vectors: float32.

    student, teacher: [..., C], of any length. Source: engines/engine_for_distill.py of
    InternVideo2's single_modality.
    """
    pair = (l2_normalise(x.astype(jnp.float32)) for x in (student, teacher))
    return 2 - 2 * jnp.mean(jnp.sum(jnp.multiply(*pair), axis=-1))
