"""RMSNorm, as functions for tokens and for heads."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from fluxvit_jax.models.arrays import Array

EPSILON = 1e-6

Axes = int | tuple[int, ...]


def rms_gain(x: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
    """1 / rms(x) over `axes`, kept with size 1: float32."""
    return jax.lax.rsqrt(jnp.mean(x.astype(jnp.float32) ** 2, axis=axes, keepdims=True) + EPSILON)


def rms_norm(
    x: Float[Array, "*shape"], scale: Float[Array, "..."], axes: Axes = -1
) -> Float[Array, "*shape"]:
    """x / rms(x) * scale in float32; returns the dtype of x."""
    return (x.astype(jnp.float32) * rms_gain(x, axes) * scale).astype(x.dtype)
