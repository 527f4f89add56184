"""The normalisation by the root mean square, in one place for tokens and for heads."""

import jax
import jax.numpy as jnp

EPSILON = 1e-6

Axes = int | tuple[int, ...]


def rms_gain(x: jax.Array, axes: Axes) -> jax.Array:
    """1 / rms(x) over some axes, which stay with size 1: float32."""
    return jax.lax.rsqrt(jnp.mean(x.astype(jnp.float32) ** 2, axis=axes, keepdims=True) + EPSILON)


def rms_norm(x: jax.Array, scale: jax.Array, axes: Axes = -1) -> jax.Array:
    """x / rms(x) * scale in float32; returns the dtype of x."""
    return (x.astype(jnp.float32) * rms_gain(x, axes) * scale).astype(x.dtype)
