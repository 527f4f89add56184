"""Attention for TPUs as two Pallas kernels, forward and backward, with tokens in the lanes.

Heads of 64 channels half-fill the 128 lanes of a TPU's registers and, as rows of 64 in memory,
waste half of the memory too. All arrays here are therefore [B, heads, D, N], and the scores of a
tile are [keys, queries]: softmax statistics are rows, maxima and sums run across registers rather
than inside them, and only narrow operands are transposed. All keys and values of a head fit in
vector memory, so the backward pass is one kernel with five matrix products that computes the scores
once; separate kernels for the gradient of q and for those of k and v need seven products.
Exponentials are powers of two, for which there is an instruction.

Forward and backward for one clip of B at 3072 tokens take 0.78 ms on a v5e, estimated from its
compiler's instructions and matrix-unit cycles; JAX's splash attention takes 1.42 ms and additional
copies. The kernels have not run on a TPU. On other platforms they are interpreted, for tests.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from fluxvit_jax.models import padded_sequence
from fluxvit_jax.models.arrays import Array

MASKED = -1e30  # score of a masked key; finite, so that the difference of two is not NaN
# Up to this many tokens the compiler's default limit of 16 MiB of vector memory is enough. A higher
# limit takes memory from everything else while the kernel runs.
LONG, LONG_MEMORY = 4096, 64 << 20

# Dimension numbers of matrix products; T: the operand is transposed, N: it is not.
NN = (((1,), (0,)), ((), ()))
TN = (((0,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))


class NormalizedQKV(NamedTuple):
    """q, k and v of all heads, with q and k to be normalized by the kernel: x * gain * scale.

    qkv: [3, B, heads, D, N], not normalized; gain: float32 [2, B, 1, 1, N], of each token;
    scale: float32 [2, 1, heads, D, 1], of each channel.
    N is a multiple of 128: see `padded_sequence.length_for`.
    """

    qkv: jax.Array
    gain: jax.Array
    scale: jax.Array


def forward(
    inputs: NormalizedQKV, lengths: Int[Array, " B"] | None
) -> tuple[Float[Array, "B heads D N"], Float[Array, "B heads 1 N"]]:
    """Softmax attention, [B, heads, D, N], and the log-sum-exp that `backward` needs.

    The latter is the base-2 logarithm of the sum of each query's exponentials, float32
    [B, heads, 1, N].
    lengths: int32 [B], at least 1, tokens at the front that are attended to; None: all.
    """
    _, B, heads, D, N = inputs.qkv.shape
    attended, log_sums = _call(
        _forward_kernel,
        "attention_forward",
        inputs=_operands(inputs),
        outputs=(
            (jax.ShapeDtypeStruct((B, heads, D, N), inputs.qkv.dtype), TILE),
            (jax.ShapeDtypeStruct((B, heads, 1, N), jnp.float32), TILE),
        ),
        lengths=lengths,
    )
    return attended, log_sums


def backward(
    inputs: NormalizedQKV,
    lengths: Int[Array, " B"] | None,
    attended: Float[Array, "B heads D N"],
    log_sums: Float[Array, "B heads 1 N"],
    gradient: Float[Array, "B heads D N"],
) -> tuple[Float[Array, "B heads D N"], Float[Array, "B heads D N"], Float[Array, "B heads D N"]]:
    """The gradients of the normalized q, the normalized k, and v: [B, heads, D, N] each.

    attended, log_sums: outputs of `forward`; gradient: of `attended`.
    """
    _, B, heads, D, N = inputs.qkv.shape
    like = jax.ShapeDtypeStruct((B, heads, D, N), inputs.qkv.dtype)
    dq, dk, dv = _call(
        _backward_kernel,
        "attention_backward",
        inputs=(*_operands(inputs), *((x, TILE) for x in (attended, log_sums, gradient))),
        outputs=((like, TILE), (like, WHOLE), (like, WHOLE)),
        lengths=lengths,
        scratch=[pltpu.VMEM((D, N), jnp.float32)] * 2,
    )
    return dq, dk, dv


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The block of an array [..., rows, N] that one step of the kernel's grid works on.

    leading: (clip, head) -> index of the leading axes; tiled: whether the last axis is cut into
    tiles, one for each tile of queries.
    """

    leading: Callable[[Any, Any], tuple[Any, ...]]  # of traced indices
    tiled: bool

    def spec(self, shape: tuple[int, ...], side: int) -> pl.BlockSpec:
        rows, length = shape[-2], side if self.tiled else shape[-1]
        return pl.BlockSpec(
            (*[None] * (len(shape) - 2), rows, length),
            lambda clip, head, tile: (*self.leading(clip, head), 0, tile if self.tiled else 0),
        )


TILE = Block(leading=lambda clip, head: (clip, head), tiled=True)  # of [B, heads, rows, N]
WHOLE = replace(TILE, tiled=False)


def _operands(inputs: NormalizedQKV) -> tuple[tuple[jax.Array, Block], ...]:
    """q, k, v, gain and scale of q, gain and scale of k: blocks of the stacked arrays."""

    def qkv(n: int) -> tuple[jax.Array, Block]:
        block = Block(leading=lambda clip, head: (n, clip, head), tiled=n == 0)
        return inputs.qkv, block

    def gain(n: int) -> tuple[jax.Array, Block]:
        return inputs.gain, Block(leading=lambda clip, head: (n, clip, 0), tiled=n == 0)

    def scale(n: int) -> tuple[jax.Array, Block]:
        return inputs.scale, Block(leading=lambda clip, head: (n, 0, head), tiled=False)

    return qkv(0), qkv(1), qkv(2), gain(0), scale(0), gain(1), scale(1)


def _call(
    kernel: Callable[..., None],
    name: str,
    inputs: tuple[tuple[jax.Array, Block], ...],
    outputs: tuple[tuple[jax.ShapeDtypeStruct, Block], ...],
    lengths: jax.Array | None,
    scratch: Sequence = (),
) -> tuple[jax.Array, ...]:
    """The outputs of a kernel that runs over a grid of clips, heads and tiles of queries."""
    _, B, heads, _, N = inputs[0][0].shape
    side = padded_sequence.tile(N)
    arrays = [array for array, _ in inputs]
    in_specs = [block.spec(array.shape, side) for array, block in inputs]
    if lengths is not None:
        arrays, in_specs = [lengths, *arrays], [pl.BlockSpec(memory_space=pltpu.SMEM), *in_specs]

    def run(*arrays: jax.Array, interpret: bool) -> Sequence[jax.Array]:
        return pl.pallas_call(
            partial(kernel, masked=lengths is not None),
            grid=(B, heads, N // side),
            in_specs=in_specs,
            out_specs=[block.spec(array.shape, side) for array, block in outputs],
            out_shape=[array for array, _ in outputs],
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=LONG_MEMORY if N > LONG else None,
            ),
            name=name,
            interpret=interpret,
        )(*arrays)

    compiled, interpreted = (partial(run, interpret=interpret) for interpret in (False, True))
    return tuple(jax.lax.platform_dependent(*arrays, tpu=compiled, default=interpreted))


def _forward_kernel(*refs: Any, masked: bool) -> None:
    """One tile of queries, [D, Q], with all keys and values of its head, [D, N]."""
    length, (*inputs, attended_ref, log_sums_ref) = _take_length(refs, masked)
    heads = _Heads(*inputs)
    q = heads.queries()
    D, Q = q.shape
    highest = jnp.full((1, Q), MASKED, jnp.float32)
    total = jnp.zeros((1, Q), jnp.float32)
    attended = jnp.zeros((D, Q), jnp.float32)
    for tile in _tiles(heads.k.shape[1]):
        scores = _scores(heads.keys(tile), q, tile, length)
        before, highest = highest, jnp.maximum(highest, jnp.max(scores, axis=0, keepdims=True))
        shares = jnp.exp2(scores - highest)
        shrink = jnp.exp2(before - highest)
        total = total * shrink + jnp.sum(shares, axis=0, keepdims=True)
        attended = attended * shrink + _dot(heads.v[:, tile], shares.astype(q.dtype), NN)
    attended_ref[...] = (attended / total).astype(attended_ref.dtype)
    log_sums_ref[...] = highest + jnp.log2(total)


def _backward_kernel(*refs: Any, masked: bool) -> None:
    """One tile of queries, [D, Q], which adds to the gradients of all keys and values, [D, N]."""
    length, refs = _take_length(refs, masked)
    *inputs, attended_ref, log_sums_ref, gradient_ref = refs[:10]
    dq_ref, dk_ref, dv_ref, dk_sum, dv_sum = refs[10:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    heads = _Heads(*inputs)
    q, log_sums, gradient = heads.queries(), log_sums_ref[...], gradient_ref[...]
    common = attended_ref[...].astype(jnp.float32) * gradient.astype(jnp.float32)
    common = jnp.sum(common, axis=0, keepdims=True)
    dq = jnp.zeros(q.shape, jnp.float32)
    for tile in _tiles(heads.k.shape[1]):
        k, v = heads.keys(tile), heads.v[:, tile]
        shares = jnp.exp2(_scores(k, q, tile, length) - log_sums)
        dv_sum[:, tile] += _dot(gradient, shares.astype(q.dtype), NT)
        dscores = (shares * (_dot(v, gradient, TN) - common)).astype(q.dtype)
        dk_sum[:, tile] += _dot(q, dscores, NT)
        dq += _dot(k, dscores, NN)
    dq_ref[...] = (dq * q.shape[0] ** -0.5).astype(dq_ref.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dk_ref[...] = (dk_sum[...] * math.log(2)).astype(dk_ref.dtype)  # for q is in base 2
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)


class _Heads(NamedTuple):
    """References to q [D, Q], k and v [D, N], and the gains and scales of q and k."""

    q: Any
    k: Any
    v: Any
    q_gain: Any
    q_scale: Any
    k_gain: Any
    k_scale: Any

    def queries(self) -> jax.Array:
        """q, normalized and scaled for softmax in base 2."""
        scale = self.q_scale[...] * (self.q.shape[0] ** -0.5 / math.log(2))
        return (self.q[...].astype(jnp.float32) * self.q_gain[...] * scale).astype(self.q.dtype)

    def keys(self, tile: slice) -> jax.Array:
        """A tile of k, normalized."""
        k = self.k[:, tile].astype(jnp.float32) * self.k_gain[:, tile] * self.k_scale[...]
        return k.astype(self.k.dtype)


def _take_length(refs: tuple, masked: bool) -> tuple[jax.Array | None, tuple]:
    """The length of this clip, None without mask, and the other references."""
    return (refs[0][pl.program_id(0)], refs[1:]) if masked else (None, refs)


def _tiles(N: int) -> list[slice]:
    """The tiles of a head's keys."""
    side = padded_sequence.tile(N)
    return [slice(start, start + side) for start in range(0, N, side)]


def _scores(k: jax.Array, q: jax.Array, tile: slice, length: jax.Array | None) -> jax.Array:
    """The scores of a tile of keys [D, tile] and queries [D, Q]: float32 [tile, Q]."""
    scores = _dot(k, q, TN)
    if length is None:
        return scores
    index = tile.start + jax.lax.broadcasted_iota(jnp.int32, (k.shape[1], 1), 0)
    return jnp.where(index < length, scores, MASKED)


def _dot(a: jax.Array, b: jax.Array, axes: tuple) -> jax.Array:
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)
