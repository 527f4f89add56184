"""The layers of FluxViT: blocks that are stacked and scanned, and the attention-pooling head.

Parameters, norms and LayerScale are float32; matrix products run in the compute dtype `dtype`.
Linear layers and CLS start as in the official code: normal with deviation 0.02 (its truncation, at
-2 and 2, never happens), zero biases.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

RMS_EPSILON = 1e-6
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
        high = x.astype(jnp.float32)
        mean_square = jnp.mean(high**2, axis=-1, keepdims=True)
        return (high * jax.lax.rsqrt(mean_square + RMS_EPSILON) * self.scale[...]).astype(x.dtype)


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


class FusedQKV(nnx.Module):
    """Queries, keys and values of all heads in one product, without bias."""

    def __init__(self, width: int, heads: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (width, 3, heads, width // heads)))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [B, N, C] -> [3, B, N, C], the heads side by side in C."""
        kernel = self.kernel[...].astype(self.dtype)
        return jnp.einsum("bnc,cjd->jbnd", x.astype(self.dtype), kernel.reshape(x.shape[-1], 3, -1))


class Attention(nnx.Module):
    """Self-attention with RMS-normalised q and k and the local position term (LPE) on v.

    q and k are normalised over the whole width before the heads are split. Beside its output it
    returns the keys, by which tokens are compared where they are merged.
    """

    def __init__(self, width: int, heads: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.qkv = FusedQKV(width, heads, dtype, rngs)
        self.q_norm = RMSNorm(width)
        self.k_norm = RMSNorm(width)
        self.lpe = Affine(width)
        self.proj = Linear(width, width, dtype=dtype, rngs=rngs)
        self.heads = heads

    def __call__(
        self, x: jax.Array, mask: jax.Array | None, size: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """x: [B, N, C] -> [B, N, C] and the keys [B, N, heads, C / heads].

        mask: bool [B, 1, 1, N], True for keys that take part; size: as in `size_bias`.
        """
        q, k, v = self.qkv(x)
        heads = partial(jnp.reshape, shape=(*x.shape[:2], self.heads, -1))
        keys = heads(self.k_norm(k))
        attended = jax.nn.dot_product_attention(
            heads(self.q_norm(q)), keys, heads(v), size_bias(size), mask
        )
        return self.proj(attended.reshape(v.shape) + self.lpe(v)), keys


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
        hidden = checkpoint_name(self.fc1(x), "fc1")
        return self.fc2(jax.nn.gelu(hidden, approximate=not self.exact))


class Block(nnx.Module):
    """A pre-norm transformer block with LayerScale and drop path: `attend`, then `transform`.

    x: [B, N, C]; mask: bool [B, 1, 1, N] or None; size: as in `size_bias`; drop path at `rate`
    where a key is given.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        exact: bool,
        layer_scale: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads, dtype, rngs)
        self.ls1 = LayerScale(width, layer_scale)
        self.norm2 = RMSNorm(width)
        self.mlp = MLP(width, 4 * width, exact, dtype, rngs)
        self.ls2 = LayerScale(width, layer_scale)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        rate: jax.Array,
        key: jax.Array | None,
        size: jax.Array | None = None,
    ) -> jax.Array:
        keys = (None, None) if key is None else jax.random.split(key)
        x, _ = self.attend(x, mask, size, rate, keys[0])
        return self.transform(x, rate, keys[1])

    def attend(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        size: jax.Array | None = None,
        rate: jax.Array | float = 0.0,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The first half: x after attention, and the keys [B, N, heads, C / heads]."""
        attended, keys = self.attn(self.norm1(x), mask, size)
        attended = checkpoint_name(attended, "attention")
        return x + drop_path(self.ls1(attended), rate, key), keys

    def transform(
        self, x: jax.Array, rate: jax.Array | float = 0.0, key: jax.Array | None = None
    ) -> jax.Array:
        """The second half: x after the MLP."""
        hidden = checkpoint_name(self.mlp(self.norm2(x)), "mlp")
        return x + drop_path(self.ls2(hidden), rate, key)


def drop_path(x: jax.Array, rate: jax.Array, key: jax.Array | None) -> jax.Array:
    """Drops the whole branch of a clip with probability `rate` and rescales the rest."""
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1 - rate).astype(x.dtype), jnp.zeros_like(x))


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
        where = None if valid is None else valid[..., None]
        share = 1 if size is None else (size / jnp.mean(size, axis=1, keepdims=True))[..., None]
        mean = jnp.mean(x * share, axis=1, keepdims=True, where=where, dtype=jnp.float32)
        q, k, v = self.q(self.norm_q(mean)), self.k(self.norm_k(x)), self.v(self.norm_v(x))
        heads = partial(jnp.reshape, shape=(x.shape[0], -1, self.heads, x.shape[-1] // self.heads))
        mask = None if valid is None else valid[:, None, None]
        pooled = jax.nn.dot_product_attention(heads(q), heads(k), heads(v), size_bias(size), mask)
        return self.proj(pooled.reshape(q.shape)[:, 0]).astype(jnp.float32)


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
