"""Attention for TPUs as two Pallas kernels, forward and backward, with tokens in the lanes.

Heads of 64 channels half-fill the 128 lanes of a TPU's registers and, as rows of 64 in memory,
waste half of that too. So all arrays here are [B, heads, K, N], and the scores of a tile are
[keys, queries]: the statistics of the softmax are rows, maxima and sums run over registers and not
inside them, and only narrow operands are ever transposed. All keys and values of a head are in
vector memory together, so that the backward pass is one kernel: it computes the scores once and
five products in all, where one kernel for the gradient of q and another for those of k and v need
seven. Exponentials are powers of two, for which there is an instruction.

Forward and backward for one clip of B at 3072 tokens take 0.78 ms on a v5e, by its compiler's
instructions and what the matrix units need, and JAX's splash attention takes 1.42 and some copies
beside it. Nothing of this has run on a
TPU. Where the platform is none, the kernels are interpreted, which is for tests.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fluxvit_jax.models import sequence

NEVER = -1e30  # the score of a masked key; finite, for no difference of two may be NaN
# Up to so many tokens what compilers allow a kernel by default is enough, 16 MiB of vector memory.
# What it is allowed beyond, they cannot use for anything else while it runs.
LONG, LONG_MEMORY = 4096, 64 << 20

# Products of two matrices, N, and of transposed ones, T.
NN = (((1,), (0,)), ((), ()))
TN = (((0,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))


class Normalised(NamedTuple):
    """q, k and v of all heads and how q and k are normalised before they meet: x * gain * scale.

    qkv: [3, B, heads, K, N], q and k as they are; gain: float32 [2, B, 1, 1, N], of each token;
    scale: float32 [2, 1, heads, K, 1], of each channel.
    N is a multiple of 128, as `sequence.length_for` makes it.
    """

    qkv: jax.Array
    gain: jax.Array
    scale: jax.Array


def forward(inputs: Normalised, lengths: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Softmax attention, [B, heads, K, N], and what `backward` needs of it beside.

    That is the logarithm to base 2 of the sum of each query's exponentials, float32
    [B, heads, 1, N].
    lengths: int32 [B], at least 1, how many places at the front are attended to; None: all.
    """
    _, B, heads, K, N = inputs.qkv.shape
    return _call(
        _forward_kernel,
        "attention_forward",
        inputs=_operands(inputs),
        outputs=(
            (jax.ShapeDtypeStruct((B, heads, K, N), inputs.qkv.dtype), PART),
            (jax.ShapeDtypeStruct((B, heads, 1, N), jnp.float32), PART),
        ),
        lengths=lengths,
    )


def backward(
    inputs: Normalised,
    lengths: jax.Array | None,
    attended: jax.Array,
    log_sums: jax.Array,
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of the normalised q, the normalised k, and v: [B, heads, K, N] each.

    attended, log_sums: what `forward` returned; gradient: of the first.
    """
    _, B, heads, K, N = inputs.qkv.shape
    like = jax.ShapeDtypeStruct((B, heads, K, N), inputs.qkv.dtype)
    return _call(
        _backward_kernel,
        "attention_backward",
        inputs=(*_operands(inputs), *((x, PART) for x in (attended, log_sums, gradient))),
        outputs=((like, PART), (like, WHOLE), (like, WHOLE)),
        lengths=lengths,
        scratch=[pltpu.VMEM((K, N), jnp.float32)] * 2,
    )


class Cut(NamedTuple):
    """Which piece of an array a kernel sees.

    index: along the leading axes, from the clip and the head; part: along the last axis the tile of
    queries that the grid is at, or all of it.
    """

    index: Callable[[int, int], tuple[int, ...]]
    part: bool

    def spec(self, shape: tuple[int, ...], side: int) -> pl.BlockSpec:
        rows, length = shape[-2], side if self.part else shape[-1]
        return pl.BlockSpec(
            (*[None] * (len(shape) - 2), rows, length),
            lambda clip, head, part: (*self.index(clip, head), 0, part if self.part else 0),
        )


PART = Cut(lambda clip, head: (clip, head), part=True)  # of [B, heads, rows, N]
WHOLE = PART._replace(part=False)


def _operands(inputs: Normalised) -> tuple[tuple[jax.Array, Cut], ...]:
    """q, k, v, gain and scale of q, gain and scale of k: nothing is copied to take them apart."""
    qkv, gain, scale = inputs
    q, k, v = (Cut(lambda clip, head, n=n: (n, clip, head), part=n == 0) for n in range(3))
    gains = (Cut(lambda clip, head, n=n: (n, clip, 0), part=n == 0) for n in range(2))
    scales = (Cut(lambda clip, head, n=n: (n, 0, head), part=False) for n in range(2))
    of_gain, of_scale = (
        [(array, cut) for cut in cuts] for array, cuts in ((gain, gains), (scale, scales))
    )
    return (qkv, q), (qkv, k), (qkv, v), of_gain[0], of_scale[0], of_gain[1], of_scale[1]


def _call(
    kernel: Callable[..., None],
    name: str,
    inputs: tuple[tuple[jax.Array, Cut], ...],
    outputs: tuple[tuple[jax.ShapeDtypeStruct, Cut], ...],
    lengths: jax.Array | None,
    scratch: Sequence = (),
) -> tuple[jax.Array, ...]:
    """A kernel over clips, heads and tiles of queries; each array with how it is cut."""
    _, B, heads, _, N = inputs[0][0].shape
    side = sequence.tile(N)
    arrays = [array for array, _ in inputs]
    in_specs = [cut.spec(array.shape, side) for array, cut in inputs]
    if lengths is not None:
        arrays, in_specs = [lengths, *arrays], [pl.BlockSpec(memory_space=pltpu.SMEM), *in_specs]

    def run(*arrays, interpret):
        return pl.pallas_call(
            partial(kernel, masked=lengths is not None),
            grid=(B, heads, N // side),
            in_specs=in_specs,
            out_specs=[cut.spec(array.shape, side) for array, cut in outputs],
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


def _forward_kernel(*refs, masked: bool) -> None:
    """One tile of queries, [K, Q], with all keys and values of its head, [K, N]."""
    length, (*inputs, attended_ref, log_sums_ref) = _take_length(refs, masked)
    heads = _Heads(*inputs)
    q = heads.queries()
    K, Q = q.shape
    highest = jnp.full((1, Q), NEVER, jnp.float32)
    total = jnp.zeros((1, Q), jnp.float32)
    attended = jnp.zeros((K, Q), jnp.float32)
    for tile in _tiles(heads.k.shape[1]):
        scores = _scores(heads.keys(tile), q, tile, length)
        before, highest = highest, jnp.maximum(highest, jnp.max(scores, axis=0, keepdims=True))
        shares = jnp.exp2(scores - highest)
        shrink = jnp.exp2(before - highest)
        total = total * shrink + jnp.sum(shares, axis=0, keepdims=True)
        attended = attended * shrink + _dot(heads.v[:, tile], shares.astype(q.dtype), NN)
    attended_ref[...] = (attended / total).astype(attended_ref.dtype)
    log_sums_ref[...] = highest + jnp.log2(total)


def _backward_kernel(*refs, masked: bool) -> None:
    """One tile of queries, [K, Q], with all keys and values, [K, N], to whose gradients it adds."""
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
    """References to q [K, Q], k and v [K, N], and the gains and scales of q and k."""

    q: Any
    k: Any
    v: Any
    q_gain: Any
    q_scale: Any
    k_gain: Any
    k_scale: Any

    def queries(self) -> jax.Array:
        """q, normalised and so scaled that powers of two of the scores are what softmax wants."""
        scale = self.q_scale[...] * (self.q.shape[0] ** -0.5 / math.log(2))
        return (self.q[...].astype(jnp.float32) * self.q_gain[...] * scale).astype(self.q.dtype)

    def keys(self, tile: slice) -> jax.Array:
        """Some of k, normalised."""
        k = self.k[:, tile].astype(jnp.float32) * self.k_gain[:, tile] * self.k_scale[...]
        return k.astype(self.k.dtype)


def _take_length(refs: tuple, masked: bool) -> tuple[jax.Array | None, tuple]:
    """The length of this clip, if there is one, and the other references."""
    return (refs[0][pl.program_id(0)], refs[1:]) if masked else (None, refs)


def _tiles(N: int) -> list[slice]:
    """The keys of a head in pieces."""
    side = sequence.tile(N)
    return [slice(start, start + side) for start in range(0, N, side)]


def _scores(k: jax.Array, q: jax.Array, tile: slice, length: jax.Array | None) -> jax.Array:
    """The scores of some keys [K, tile] and queries [K, Q]: float32 [tile, Q]."""
    scores = _dot(k, q, TN)
    if length is None:
        return scores
    place = tile.start + jax.lax.broadcasted_iota(jnp.int32, (k.shape[1], 1), 0)
    return jnp.where(place < length, scores, NEVER)


def _dot(a: jax.Array, b: jax.Array, axes: tuple) -> jax.Array:
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)
