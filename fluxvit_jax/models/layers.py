"""The layers of FluxViT: blocks that are stacked and scanned, and the attention-pooling head.

Parameters, norms and LayerScale are float32; matrix products run in the compute dtype `dtype`.
Linear layers and CLS start as in the official code: normal with deviation 0.02 (its truncation, at
-2 and 2, never happens), zero biases.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fluxvit_jax.models import attention, norms, placement
from fluxvit_jax.models.attention import TOKENS_FIRST, Order

LAYER_NORM_EPSILON = 1e-5
KERNEL_STD = 0.02

kernel_init = nnx.initializers.normal(KERNEL_STD)

Linear = partial(nnx.Linear, kernel_init=kernel_init)
LayerNorm = partial(nnx.LayerNorm, epsilon=LAYER_NORM_EPSILON, dtype=jnp.float32)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32; returns the dtype of x."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        return norms.rms_norm(x, self.scale[...])


class Affine(nnx.Module):
    """x * scale + bias for each channel: the official depthwise convolution of size 1 x 1 x 1."""

    def __init__(self, width: int, scale: float = 1.0):
        self.scale = nnx.Param(jnp.full(width, scale))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.scale[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class LayerScale(nnx.Module):
    """x * gamma, multiplied in float32; returns the dtype of x."""

    def __init__(self, width: int, initial: float):
        self.gamma = nnx.Param(jnp.full(width, initial))

    def __call__(self, x: jax.Array) -> jax.Array:
        return (x.astype(jnp.float32) * self.gamma[...]).astype(x.dtype)


def scaled(linear: nnx.Linear, gamma: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The kernel and bias of a linear layer whose output is scaled by gamma, [C], if given.

    LayerScale costs nothing this way: its gradient follows from the kernel's, and the layer's
    output need not be kept for it.
    """
    kernel, bias = linear.kernel[...], linear.bias[...]
    if gamma is not None:
        kernel, bias = kernel * gamma, bias * gamma
    return kernel.astype(linear.dtype), bias.astype(linear.dtype)


class FusedQKV(nnx.Module):
    """Queries, keys and values of all heads in one product, without bias."""

    def __init__(self, width: int, heads: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (width, 3, heads, width // heads)))
        self.dtype = dtype

    def __call__(self, x: jax.Array, order: Order = TOKENS_FIRST) -> jax.Array:
        """x: [B, N, C] -> [3, B, N, heads, K], or in another order."""
        return jnp.einsum(order.project, x.astype(self.dtype), self.kernel[...].astype(self.dtype))


class HeadsNorm(RMSNorm):
    """RMSNorm over the whole width of what is split into heads already."""

    def __call__(self, x: jax.Array, order: Order = TOKENS_FIRST) -> jax.Array:
        """x: [B, N, heads, K], or in another order."""
        return order.normalise(x, self.scale[...])


class HeadsAffine(Affine):
    """x * scale + bias for each channel of what is split into heads."""

    def __call__(self, x: jax.Array, order: Order = TOKENS_FIRST) -> jax.Array:
        """x: [B, N, heads, K], or in another order."""
        scale, bias = (order.of_channel(p[...], x.shape) for p in (self.scale, self.bias))
        return x * scale.astype(x.dtype) + bias.astype(x.dtype)


@dataclass(frozen=True)
class BlockConfig:
    """A transformer block of FluxViT or InternVideo2.

    hidden: width inside the MLP; kernel: of attention, one of `attention.KERNELS`; exact: GELU by
    erf, not its tanh approximation; layer_scale: what LayerScale starts at; lpe: whether v has the
    local position term; recompute: see `Block`.
    """

    width: int
    heads: int
    hidden: int
    kernel: str = "xla"
    exact: bool = False
    layer_scale: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    lpe: bool = True
    recompute: bool = False


class Attention(nnx.Module):
    """Self-attention with RMS-normalised q and k and, if asked, the local position term on v.

    q and k are normalised over the whole width, all heads together. It is `project`, `attend` and
    `join`, in whose order of axes the arrays between them are: that of the attention kernel.
    """

    def __init__(self, config: BlockConfig, rngs: nnx.Rngs):
        width, dtype = config.width, config.dtype
        self.qkv = FusedQKV(width, config.heads, dtype, rngs)
        self.q_norm = HeadsNorm(width)
        self.k_norm = HeadsNorm(width)
        self.lpe = HeadsAffine(width) if config.lpe else None
        self.proj = Linear(width, width, dtype=dtype, rngs=rngs)
        self.heads = config.heads
        self.kernel = config.kernel

    def __call__(
        self,
        x: jax.Array,
        lengths: jax.Array | None,
        size: jax.Array | None = None,
        gamma: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """x: [B, N, C] -> [B, N, C], times `gamma` if given, and the keys.

        By the keys tokens are compared where they are merged: where `size` is given they are
        [B, N, heads, K]. lengths: as in `attention.attend`; size: as in `size_bias`.
        """
        qkv = self.project(x, size)
        joined = self.join(self.attend(qkv, lengths, size), qkv[2], size, gamma)
        return joined, self.k_norm(qkv[1], self._order(size))

    def project(self, x: jax.Array, size: jax.Array | None) -> jax.Array:
        """x: [B, N, C] -> q, k and v, [3, B, ...]."""
        return self.qkv(x, self._order(size))

    def attend(
        self, qkv: jax.Array, lengths: jax.Array | None, size: jax.Array | None
    ) -> jax.Array:
        """q, k and v, [3, B, ...], to what each token attends to, [B, ...]."""
        scales = self.q_norm.scale[...], self.k_norm.scale[...]
        return attention.attend(qkv, *scales, self._kernel(size), lengths, size_bias(size))

    def join(
        self, attended: jax.Array, v: jax.Array, size: jax.Array | None, gamma: jax.Array | None
    ) -> jax.Array:
        """The heads together, [B, ...] -> [B, N, C], times `gamma` if given."""
        order = self._order(size)
        kernel, bias = scaled(self.proj, gamma)
        kernel = kernel.reshape(self.heads, -1, kernel.shape[-1])
        if self.lpe is not None:
            attended += self.lpe(v, order)
        return jnp.einsum(order.join, attended, kernel) + bias

    def _kernel(self, size: jax.Array | None) -> str:
        return self.kernel if size is None else "xla"  # no other takes a bias

    def _order(self, size: jax.Array | None) -> Order:
        return attention.order(self._kernel(size))


def size_bias(size: jax.Array | None) -> jax.Array | None:
    """Proportional attention (ToMe): a token that stands for n patches is attended to as n are.

    size: float32 [B, N], or None where each token is one patch.
    Returns what is added to the attention logits, float32 [B, 1, 1, N].
    """
    return None if size is None else jnp.log(size)[:, None, None]


class MLP(nnx.Module):
    """Two linear layers with GELU between; `exact` chooses erf over the tanh approximation."""

    def __init__(self, width: int, hidden: int, exact: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.fc1 = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, width, dtype=dtype, rngs=rngs)
        self.exact = exact

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.finish(self.fc1(x), None)

    def finish(self, hidden: jax.Array, gamma: jax.Array | None) -> jax.Array:
        """What `fc1` puts out, [B, N, hidden], to [B, N, C], times `gamma` if given."""
        kernel, bias = scaled(self.fc2, gamma)
        return jax.nn.gelu(hidden, approximate=not self.exact) @ kernel + bias


class Block(nnx.Module):
    """A pre-norm transformer block with LayerScale and drop path.

    With `recompute` the backward pass has of the forward pass the input, q, k and v, what they
    attend to, the tokens after attention and the output of fc1, 10 numbers of a token and channel
    (and what kernels other than ours keep); all else it computes anew, none of it a product of
    matrices. Gradients are the same.
    """

    def __init__(self, config: BlockConfig, rngs: nnx.Rngs):
        width = config.width
        self.norm1 = RMSNorm(width)
        self.attn = Attention(config, rngs)
        self.ls1 = LayerScale(width, config.layer_scale)
        self.norm2 = RMSNorm(width)
        self.mlp = MLP(width, config.hidden, config.exact, config.dtype, rngs)
        self.ls2 = LayerScale(width, config.layer_scale)
        self.recompute = config.recompute

    def __call__(
        self,
        x: jax.Array,
        lengths: jax.Array | None,
        rate: jax.Array,
        key: jax.Array | None,
        size: jax.Array | None = None,
    ) -> jax.Array:
        """x: [B, N, C]; lengths: as in `attention.attend`; size: as in `size_bias`.

        Drop path at `rate` where a key is given.
        """
        kept = (None, None) if key is None else drop_path(rate, key)
        x = placement.by_clip(x)
        qkv = self._stage(lambda self, x: self.attn.project(self.norm1(x), size), x)
        attended = self.attn.attend(qkv, lengths, size)

        def join(self, x, attended, qkv, kept):
            return branch(x, self.attn.join(attended, qkv[2], size, self.ls1.gamma[...]), kept)

        x = self._stage(join, x, attended, qkv, kept[0])
        return placement.by_clip(self.transform(x, kept[1]))

    def attend(self, x: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first half where tokens are merged after it: x, and the keys [B, N, heads, K]."""
        attended, keys = self.attn(self.norm1(x), None, size, self.ls1.gamma[...])
        return x + attended, keys

    def transform(self, x: jax.Array, kept: jax.Array | None = None) -> jax.Array:
        """The second half: x after the MLP. kept: as `drop_path` draws it."""
        hidden = self._stage(lambda self, x: self.mlp.fc1(self.norm2(x)), x)

        def finish(self, x, hidden, kept):
            return branch(x, self.mlp.finish(hidden, self.ls2.gamma[...]), kept)

        return self._stage(finish, x, hidden, kept)

    def _stage(self, function: Callable[..., jax.Array], *inputs: Any) -> jax.Array:
        """function(self, *inputs), of which the backward pass keeps the inputs if we recompute."""
        if not self.recompute:
            return function(self, *inputs)
        graph, state = nnx.split(self)
        return recomputed(
            lambda state, *inputs: function(nnx.merge(graph, state), *inputs), state, *inputs
        )


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs), whose backward pass starts from the inputs and keeps nothing else.

    As `jax.checkpoint` does it, but that rounds what it keeps by a name in a pass of its own.
    """
    segment = jax.custom_vjp(function)

    def backward(inputs, gradient):
        # Otherwise the compiler finds that it has been computed before, and keeps it.
        inputs = jax.lax.optimization_barrier(inputs)
        return jax.vjp(function, *inputs)[1](gradient)

    segment.defvjp(lambda *inputs: (function(*inputs), inputs), backward)
    return segment(*inputs)


def drop_path(rate: jax.Array, keys: jax.Array) -> jax.Array:
    """By what both branches of a block are multiplied: float32 [2, B, 1, 1]; keys: [B].

    0 with probability `rate`, else so much that the mean is 1.
    """
    draw = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, (2,)), out_axes=1)
    return draw(keys)[..., None, None] / (1 - rate)


def branch(x: jax.Array, added: jax.Array, kept: jax.Array | None) -> jax.Array:
    """x + added, times `kept` if that is given."""
    return x + (added if kept is None else (added * kept).astype(x.dtype))


class AttentionPool(nnx.Module):
    """One query, the mean of all tokens, attends to them: [B, N, C] -> [B, out]."""

    def __init__(self, width: int, out: int, heads: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm_q = LayerNorm(width, rngs=rngs)
        self.norm_k = LayerNorm(width, rngs=rngs)
        self.norm_v = LayerNorm(width, rngs=rngs)
        self.q = Linear(width, width, dtype=dtype, rngs=rngs)
        self.k = Linear(width, width, dtype=dtype, rngs=rngs)
        self.v = Linear(width, width, dtype=dtype, rngs=rngs)
        self.proj = Linear(width, out, dtype=dtype, rngs=rngs)
        self.heads = heads

    def __call__(
        self, x: jax.Array, valid: jax.Array | None, size: jax.Array | None = None
    ) -> jax.Array:
        """x: [B, N, C]; valid: bool [B, N] or None; size: as in `size_bias`, and each token has
        its share in the mean. Returns float32 [B, out].
        """
        share = 1 if size is None else (size / jnp.mean(size, axis=1, keepdims=True))[..., None]
        q, k = self.query(x * share, valid), self._heads(self.k(self.norm_k(x)))
        v = self._heads(self.v(self.norm_v(x)))
        mask = None if valid is None else valid[:, None, None]
        pooled = jax.nn.dot_product_attention(q, k, v, size_bias(size), mask)
        return self.proj(pooled.reshape(x.shape[0], -1)).astype(jnp.float32)

    def query(self, x: jax.Array, valid: jax.Array | None) -> jax.Array:
        """The one query of each head, from the mean of x, [B, N, C]: [B, 1, heads, K]."""
        where = None if valid is None else valid[..., None]
        mean = jnp.mean(x, axis=1, keepdims=True, where=where, dtype=jnp.float32)
        return self._heads(self.q(self.norm_q(mean)))

    def weights(self, x: jax.Array, valid: jax.Array | None) -> jax.Array:
        """How much each token is attended to, the mean of all heads: float32 [B, N].

        The weights of a clip add up to 1.
        """
        q, k = self.query(x, valid), self._heads(self.k(self.norm_k(x)))
        logits = jnp.einsum("bqhk,bnhk->bhn", q, k, preferred_element_type=jnp.float32)
        where = None if valid is None else valid[:, None]
        return jnp.mean(jax.nn.softmax(logits / q.shape[-1] ** 0.5, where=where), axis=1)

    def _heads(self, x: jax.Array) -> jax.Array:
        """[B, N, C] -> [B, N, heads, K]."""
        return x.reshape(*x.shape[:2], self.heads, -1)


class AlignProjector(nnx.Module):
    """Linear, LayerNorm, L2 normalisation: aligns a smaller budget's vector with the largest's."""

    def __init__(self, width: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.head = Linear(width, width, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return l2_normalise(self.norm(self.head(x)).astype(jnp.float32))


def l2_normalise(x: jax.Array) -> jax.Array:
    """x over its Euclidean norm along the last axis."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-24))


def structure(make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.GraphDef:
    """The structure of a module without any parameter being made."""
    return nnx.split(jax.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)[0]


def stack(count: int, rngs: nnx.Rngs, make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    """`count` modules as one, each parameter with a leading axis."""
    return nnx.split_rngs(splits=count)(nnx.vmap(make))(rngs)


def unstack(stacked: nnx.Module, index: int) -> nnx.Module:
    """One of the modules that `stack` made."""
    graph, state = nnx.split(stacked)
    return nnx.merge(graph, layer(state, index))


def layer(stacked: Any, index: int) -> Any:
    """One layer of arrays [depth, ...], or of tuples of so many (see `fluxvit.for_passes`)."""
    return jax.tree.map(lambda leaf: leaf[index], stacked, is_leaf=lambda x: isinstance(x, tuple))
