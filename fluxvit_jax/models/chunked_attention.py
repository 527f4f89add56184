"""Attention for CPUs in plain JAX: the scores of one head and one chunk of queries at a time.

The scores of all queries of all heads are far larger than a CPU's caches, and softmax passes over
them several times. A chunk's scores stay in the cache. None are saved: the backward pass computes
them again, from the log-sum-exp of each query.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from fluxvit_jax.models.arrays import Array

CHUNK = 256  # queries, about: their scores with 2048 keys are 2 MB
FEWEST = 128  # with fewer tokens, plain attention is as fast and compiles faster


class Inputs(NamedTuple):
    """Queries, keys and values of all heads, [B, heads, N, D] each, and a bias.

    bias: added to the logits, float32 [B, 1, 1, N], or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None


def forward(
    inputs: Inputs,
) -> tuple[Float[Array, "B heads N D"], Float[Array, "B heads chunks rows"]]:
    """Softmax attention, [B, heads, N, D], and the log-sum-exp that `backward` needs.

    The latter is the logarithm of the sum of each query's exponentials, float32
    [B, heads, chunks, rows]; rows past the last query mean nothing.
    """

    def attend_head(head: tuple) -> tuple[jax.Array, jax.Array]:
        chunks, k, v, bias = head

        def attend_chunk(q: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = _logits(q, k, bias)
            top = jnp.max(logits, axis=1, keepdims=True)
            weights = jnp.exp(logits - top)
            total = jnp.sum(weights, axis=1, keepdims=True)
            return weights @ v / total, (top + jnp.log(total))[:, 0]

        return jax.lax.map(attend_chunk, chunks)

    q, k, v, bias = _by_head(inputs)
    attended, log_sums = jax.lax.map(attend_head, (_chunks(q), k, v, bias))
    attended = _joined(attended, inputs.q.shape).astype(inputs.v.dtype)
    return attended, log_sums.reshape(*inputs.q.shape[:2], *log_sums.shape[1:])


def backward(
    inputs: Inputs,
    attended: Float[Array, "B heads N D"],
    log_sums: Float[Array, "B heads chunks rows"],
    gradient: Float[Array, "B heads N D"],
) -> Inputs:
    """The gradients of the inputs; that of the bias by head, [B, heads, 1, N].

    attended, log_sums: outputs of `forward`; gradient: of `attended`.
    """

    def head_gradients(head: tuple) -> tuple:
        chunks, k, v, bias = head

        def add_chunk(sums: tuple, chunk: tuple) -> tuple[tuple, jax.Array]:
            q, log_sums, gradient, inner = chunk
            weights = jnp.exp(_logits(q, k, bias) - log_sums[:, None])
            dlogits = weights * (gradient @ v.T - inner[:, None])
            # As [D, N], not [N, D]: products whose last axis is the long one are faster.
            dk, dv = q.T @ dlogits, gradient.T @ weights
            dbias = None if bias is None else jnp.sum(dlogits, axis=0)
            return jax.tree.map(jnp.add, sums, (dk, dv, dbias)), dlogits @ k

        zeros = jax.tree.map(jnp.zeros_like, (k.T, v.T, bias))
        (dk, dv, dbias), dq = jax.lax.scan(add_chunk, zeros, chunks)
        return dq, dk.T, dv.T, dbias

    shape, dtype = inputs.q.shape, inputs.q.dtype
    q, k, v, bias = _by_head(inputs)
    gradient = _flat(gradient)
    # What the gradient of softmax subtracts, the sum of weights * dweights, for each query.
    inner = jnp.sum(gradient * _flat(attended), axis=2)
    log_sums = log_sums.reshape(-1, *log_sums.shape[2:])
    chunks = _chunks(q), log_sums, _chunks(gradient), _chunks(inner)
    dq, dk, dv, dbias = jax.lax.map(head_gradients, (chunks, k, v, bias))
    dq = _joined(dq, shape) * shape[3] ** -0.5
    return Inputs(
        dq.astype(dtype),
        dk.reshape(shape).astype(dtype),
        dv.reshape(shape).astype(dtype),
        None if bias is None else dbias.reshape(*shape[:2], 1, -1),
    )


def _logits(q: jax.Array, k: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Scores of one head's queries, [rows, D], and all its keys, [N, D]: [rows, N]."""
    logits = q @ k.T
    return logits if bias is None else logits + bias


def _by_head(inputs: Inputs) -> Inputs:
    """float32 arrays with clips and heads on one axis, q scaled: [B * heads, N, D]; bias: [., N].

    Of 16-bit numbers too: XLA's products for CPUs take float32.
    """
    B, heads, N, D = inputs.q.shape
    bias = inputs.bias
    if bias is not None:
        bias = jnp.broadcast_to(bias, (B, heads, 1, N)).reshape(-1, N)
    return Inputs(_flat(inputs.q) * D**-0.5, _flat(inputs.k), _flat(inputs.v), bias)


def _flat(x: jax.Array) -> jax.Array:
    """[B, heads, N, D] -> float32 [B * heads, N, D]."""
    return x.reshape(-1, *x.shape[2:]).astype(jnp.float32)


def _chunks(x: jax.Array) -> jax.Array:
    """Chunks of about CHUNK rows, padded with zeros: [., N, ...] -> [., chunks, rows, ...].

    Of equal size: 1025 tokens are 4 chunks of 257, with 3 rows of padding.
    """
    N = x.shape[1]
    chunks = max(1, round(N / CHUNK))
    rows = math.ceil(N / chunks)
    padding = [(0, 0), (0, chunks * rows - N)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, padding).reshape(-1, chunks, rows, *x.shape[2:])


def _joined(chunks: jax.Array, shape: tuple) -> jax.Array:
    """The inverse, also of `_flat`: [B * heads, chunks, rows, D] -> `shape`, [B, heads, N, D]."""
    B, heads, N, D = shape
    return chunks.reshape(B, heads, -1, D)[:, :, :N]
