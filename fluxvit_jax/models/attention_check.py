"""Attention kernels against the formula, on the device at hand: outputs and gradients."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fluxvit_jax.models import attention

LENGTHS, HEADS = (512, 300), 2  # tokens of two clips


def tolerance(dtype: DTypeLike) -> float:
    """The largest `difference` that is rounding: as in the tests, but on any device."""
    return 1e-3 if jnp.dtype(dtype).itemsize == 4 else 3e-2


def difference(kernel: str, dtype: DTypeLike, head_size: int) -> float:
    """How far a kernel is from the formula in float32, in outputs and gradients.

    The largest difference in each, as a share of the largest number in it. Raises what compiling or
    running the kernel raises.
    """
    inputs = _inputs(dtype, head_size)
    with jax.default_matmul_precision("highest"):
        expected = _with_gradients(_formula, inputs, jnp.float32)
    found = _with_gradients(_of_kernel(kernel), inputs, dtype)
    pairs = zip(map(np.float32, found), map(np.float32, expected), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def _inputs(dtype: DTypeLike, head_size: int) -> tuple[jax.Array, ...]:
    """qkv [3, B, N, heads, D], weights of the outputs [B, N, heads, D], two scales [heads * D].

    weights: 0 past the lengths, where outputs mean nothing.
    """
    rng = np.random.default_rng(0)
    shape = (3, len(LENGTHS), LENGTHS[0], HEADS, head_size)
    qkv = jnp.asarray(rng.normal(size=shape), dtype)
    weights = rng.normal(size=shape[1:]) * _is_real()[..., None, None]
    scales = rng.normal(1, 0.5, (2, HEADS * head_size)).astype(np.float32)
    return qkv, jnp.asarray(weights, jnp.float32), *map(jnp.asarray, scales)


def _is_real() -> np.ndarray:
    """Which tokens lie within the lengths: bool [B, N]."""
    return np.arange(LENGTHS[0]) < np.array(LENGTHS)[:, None]


def _with_gradients(
    attend: Callable, inputs: tuple[jax.Array, ...], dtype: DTypeLike
) -> list[jax.Array]:
    """Outputs [B, N, heads, D] and the gradients of qkv and both scales.

    attend: function of qkv, both scales and the lengths, int32 [B]; dtype: of qkv.
    """
    qkv, weights, *scales = inputs
    lengths = jnp.array(LENGTHS, jnp.int32)

    def attended(*inputs: jax.Array) -> jax.Array:
        real = _is_real()[..., None, None]
        return jnp.where(real, attend(*inputs, lengths), 0).astype(jnp.float32)

    @jax.jit
    def both(*inputs: jax.Array) -> list[jax.Array]:
        out, pull_back = jax.vjp(attended, *inputs)
        dqkv, *dscales = pull_back(weights)
        return [out, *dqkv, *dscales]

    return both(qkv.astype(dtype), *scales)


def _of_kernel(kernel: str) -> Callable:
    """A kernel as a function for `_with_gradients`."""
    tokens_last = attention.qkv_layout(kernel) == attention.BHDN

    def attend(
        qkv: jax.Array, q_scale: jax.Array, k_scale: jax.Array, lengths: jax.Array
    ) -> jax.Array:
        own = qkv.transpose(0, 1, 3, 4, 2) if tokens_last else qkv
        out = attention.attend(own, q_scale, k_scale, kernel, lengths)
        return out.transpose(0, 3, 1, 2) if tokens_last else out

    return attend


def _formula(
    qkv: jax.Array, q_scale: jax.Array, k_scale: jax.Array, lengths: jax.Array
) -> jax.Array:
    """Attention as it is written: a function for `_with_gradients`."""
    q = attention.BNHD.normalize(qkv[0], q_scale)
    k = attention.BNHD.normalize(qkv[1], k_scale)
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    real = jnp.arange(LENGTHS[0]) < lengths[:, None]
    shares = jax.nn.softmax(jnp.where(real[:, None, None], scores, -jnp.inf))
    return jnp.einsum("bhnm,bmhd->bnhd", shares, qkv[2])
