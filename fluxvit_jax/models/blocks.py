"""Layers of FluxViT: blocks that are stacked and scanned, and the attention-pooling head.

Parameters, norms and LayerScale are float32; matrix products run in the compute dtype `dtype`.
Linear layers and CLS start as in the official code: normal with deviation 0.02 (its truncation, at
-2 and 2, never happens), zero biases.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Key

from fluxvit_jax.models import attention, norms, products, sharding_constraints
from fluxvit_jax.models.arrays import Array
from fluxvit_jax.models.attention import BNHD, QKVLayout

LAYER_NORM_EPSILON = 1e-5
KERNEL_STD = 0.02

Module = TypeVar("Module", bound=nnx.Module)
Einsum = Callable[[str, jax.Array, jax.Array], jax.Array]

kernel_init = nnx.initializers.normal(KERNEL_STD)

Linear = partial(nnx.Linear, kernel_init=kernel_init)
LayerNorm = partial(nnx.LayerNorm, epsilon=LAYER_NORM_EPSILON, dtype=jnp.float32)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32; returns the dtype of x."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        return norms.rms_norm(x, self.scale[...])


class Affine(nnx.Module):
    """x * scale + bias for each channel: the official depthwise convolution of size 1 x 1 x 1."""

    def __init__(self, width: int, scale: float = 1.0):
        self.scale = nnx.Param(jnp.full(width, scale))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        return x * self.scale[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class LayerScale(nnx.Module):
    """x * gamma, multiplied in float32; returns the dtype of x."""

    def __init__(self, width: int, initial: float):
        self.gamma = nnx.Param(jnp.full(width, initial))

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        return (x.astype(jnp.float32) * self.gamma[...]).astype(x.dtype)


def fold_layer_scale(
    linear: nnx.Linear, gamma: Float[Array, " C"] | None
) -> tuple[Float[Array, "inputs C"], Float[Array, " C"]]:
    """The kernel and bias of a linear layer with LayerScale's gamma, [C], folded in if given.

    LayerScale costs nothing this way: its gradient follows from the kernel's, and the layer's
    output need not be saved for it.
    """
    assert linear.bias is not None
    kernel, bias = linear.kernel[...], linear.bias[...]
    if gamma is not None:
        kernel, bias = kernel * gamma, bias * gamma
    return kernel.astype(linear.dtype), bias.astype(linear.dtype)


class FusedQKV(nnx.Module):
    """Queries, keys and values of all heads in one product, without bias."""

    def __init__(self, width: int, heads: int, dtype: DTypeLike, einsum: Einsum, rngs: nnx.Rngs):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (width, 3, heads, width // heads)))
        self.dtype = dtype
        self.einsum = einsum

    def __call__(
        self, x: Float[Array, "B N C"], layout: QKVLayout = BNHD
    ) -> Float[Array, "3 B _ _ _"]:
        """x: [B, N, C] -> [3, B, N, heads, D], or in another layout."""
        return self.einsum(
            layout.projection, x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        )


class HeadsNorm(RMSNorm):
    """RMSNorm over the whole width of an array that is split into heads."""

    def __call__(
        self, x: Float[Array, "*shape"], layout: QKVLayout = BNHD
    ) -> Float[Array, "*shape"]:
        """x: [B, N, heads, D], or in another layout."""
        return layout.normalize(x, self.scale[...])


class HeadsAffine(Affine):
    """x * scale + bias for each channel of an array that is split into heads."""

    def __call__(
        self, x: Float[Array, "*shape"], layout: QKVLayout = BNHD
    ) -> Float[Array, "*shape"]:
        """x: [B, N, heads, D], or in another layout."""
        scale, bias = (layout.per_channel(p[...], x.shape) for p in (self.scale, self.bias))
        return x * scale.astype(x.dtype) + bias.astype(x.dtype)


@dataclass(frozen=True)
class BlockConfig:
    """The shape of a transformer block of FluxViT or InternVideo2.

    hidden: width inside the MLP; kernel: of attention, one of `attention.KERNELS`; exact: GELU by
    erf, not its tanh approximation; layer_scale: initial LayerScale; lpe: whether v has the local
    position term; recompute: see `Block`; float32_products: products give float32 and round it,
    see `products`.
    """

    width: int
    heads: int
    hidden: int
    kernel: str = "xla"
    exact: bool = False
    layer_scale: float = 1e-5
    dtype: DTypeLike = jnp.float32
    lpe: bool = True
    recompute: bool = False
    float32_products: bool = False

    @property
    def einsum(self) -> Einsum:
        """The einsum of activations and weights."""
        return products.einsum if self.float32_products else jnp.einsum


class Attention(nnx.Module):
    """Self-attention with RMSNorm of q and k and, optionally, the local position term on v.

    q and k are normalized over the whole width, all heads together. A call is `qkv_projection`,
    `attend` and `output_projection`; arrays between them have the layout of the attention kernel.
    """

    def __init__(self, config: BlockConfig, rngs: nnx.Rngs):
        width, dtype = config.width, config.dtype
        self.qkv = FusedQKV(width, config.heads, dtype, config.einsum, rngs)
        self.q_norm = HeadsNorm(width)
        self.k_norm = HeadsNorm(width)
        self.lpe = HeadsAffine(width) if config.lpe else None
        self.proj = Linear(width, width, dtype=dtype, rngs=rngs)
        self.heads = config.heads
        self.kernel = config.kernel
        self.einsum = config.einsum

    def __call__(
        self,
        x: Float[Array, "B N C"],
        lengths: jax.Array | None,
        size: Float[Array, "B N"] | None = None,
        gamma: Float[Array, " C"] | None = None,
    ) -> tuple[Float[Array, "B N C"], Float[Array, "B _ _ _"]]:
        """x: [B, N, C] -> [B, N, C], times `gamma` if given, and the keys.

        Token merging compares tokens by their keys, which are [B, N, heads, D] if `size` is given.
        lengths: as in `attention.attend`; size: as in `size_bias`.
        """
        qkv = self.qkv_projection(x, size)
        attended = self.attend(qkv, lengths, size)
        x = self.output_projection(attended, qkv[2], size, gamma)
        return x, self.k_norm(qkv[1], self._layout(size))

    def qkv_projection(
        self, x: Float[Array, "B N C"], size: Float[Array, "B N"] | None
    ) -> Float[Array, "3 B _ _ _"]:
        """x: [B, N, C] -> q, k and v, [3, B, ...]."""
        return self.qkv(x, self._layout(size))

    def attend(
        self,
        qkv: Float[Array, "3 B *axes"],
        lengths: jax.Array | None,
        size: Float[Array, "B N"] | None,
    ) -> Float[Array, "B *axes"]:
        """Attention output of all heads: q, k and v, [3, B, ...] -> [B, ...]."""
        scales = self.q_norm.scale[...], self.k_norm.scale[...]
        return attention.attend(qkv, *scales, self._kernel(size), lengths, size_bias(size))

    def output_projection(
        self,
        attended: Float[Array, "B *axes"],
        v: Float[Array, "B *axes"],
        size: Float[Array, "B N"] | None,
        gamma: Float[Array, " C"] | None,
    ) -> Float[Array, "B N C"]:
        """Linear map of the joined heads, [B, ...] -> [B, N, C], times `gamma` if given."""
        layout = self._layout(size)
        kernel, bias = fold_layer_scale(self.proj, gamma)
        kernel = rearrange(kernel, "(h d) c -> h d c", h=self.heads)
        if self.lpe is not None:
            attended += self.lpe(v, layout)
        return self.einsum(layout.output, attended, kernel) + bias

    def _kernel(self, size: Array | None) -> str:
        return self.kernel if size is None else attention.with_bias(self.kernel)

    def _layout(self, size: Array | None) -> QKVLayout:
        return attention.qkv_layout(self._kernel(size))


def size_bias(size: Float[Array, "B N"] | None) -> Float[Array, "B 1 1 N"] | None:
    """Bias of proportional attention (ToMe): a token of n patches gets the attention of n tokens.

    size: float32 [B, N], patches per token, or None if each token is one patch.
    Returns the bias of the attention logits, float32 [B, 1, 1, N].
    """
    return None if size is None else jnp.log(size)[:, None, None]


class MLP(nnx.Module):
    """Two linear layers with GELU between; `exact` chooses erf over the tanh approximation."""

    def __init__(self, config: BlockConfig, rngs: nnx.Rngs):
        self.fc1 = Linear(config.width, config.hidden, dtype=config.dtype, rngs=rngs)
        self.fc2 = Linear(config.hidden, config.width, dtype=config.dtype, rngs=rngs)
        self.exact = config.exact
        self.einsum = config.einsum

    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        return self.output(self.input(x), None)

    def input(self, x: Float[Array, "B N C"]) -> Float[Array, "B N hidden"]:
        """`fc1`: [B, N, C] -> [B, N, hidden]."""
        kernel, bias = fold_layer_scale(self.fc1, None)
        return self.einsum("bnc,cd->bnd", x.astype(kernel.dtype), kernel) + bias

    def output(
        self, hidden: Float[Array, "B N hidden"], gamma: Float[Array, " C"] | None
    ) -> Float[Array, "B N C"]:
        """GELU and `fc2` of the output of `fc1`: [B, N, hidden] -> [B, N, C], times `gamma`."""
        kernel, bias = fold_layer_scale(self.fc2, gamma)
        hidden = jax.nn.gelu(hidden, approximate=not self.exact)
        return self.einsum("bnd,dc->bnc", hidden, kernel) + bias


class Block(nnx.Module):
    """A pre-norm transformer block with LayerScale and drop path.

    With `recompute`, only the input, q, k, v, the attention output, the tokens after attention and
    the output of fc1 are saved for the backward pass: 10 values per token and channel (and what
    kernels other than ours save). Norms, GELU and drop path are recomputed, but no matrix product.
    Gradients are unchanged.
    """

    def __init__(self, config: BlockConfig, rngs: nnx.Rngs):
        width = config.width
        self.norm1 = RMSNorm(width)
        self.attn = Attention(config, rngs)
        self.ls1 = LayerScale(width, config.layer_scale)
        self.norm2 = RMSNorm(width)
        self.mlp = MLP(config, rngs)
        self.ls2 = LayerScale(width, config.layer_scale)
        self.recompute = config.recompute

    def __call__(
        self,
        x: Float[Array, "B N C"],
        lengths: jax.Array | None,
        rate: Float[Array, ""] | float,
        key: Key[Array, " B"] | None,
        size: Float[Array, "B N"] | None = None,
    ) -> Float[Array, "B N C"]:
        """x: [B, N, C]; lengths: as in `attention.attend`; size: as in `size_bias`.

        Drop path at `rate` if a key is given.
        """
        multipliers = (None, None) if key is None else drop_path(rate, key)
        x = sharding_constraints.constrain_batch(x)
        qkv = self._stage(lambda self, x: self.attn.qkv_projection(self.norm1(x), size), x)
        attended = self.attn.attend(qkv, lengths, size)

        def output(self, x, attended, qkv, multiplier):
            out = self.attn.output_projection(attended, qkv[2], size, self.ls1.gamma[...])
            return residual(x, out, multiplier)

        x = self._stage(output, x, attended, qkv, multipliers[0])
        return sharding_constraints.constrain_batch(self.mlp_branch(x, multipliers[1]))

    def attention_branch(
        self, x: Float[Array, "B N C"], size: Float[Array, "B N"]
    ) -> tuple[Float[Array, "B N C"], Float[Array, "B N heads D"]]:
        """The first half for token merging: x after attention, and the keys [B, N, heads, D]."""
        attended, keys = self.attn(self.norm1(x), None, size, self.ls1.gamma[...])
        return x + attended, keys

    def mlp_branch(
        self, x: Float[Array, "B N C"], multiplier: Float[Array, "B 1 1"] | None = None
    ) -> Float[Array, "B N C"]:
        """The second half: x after the MLP. multiplier: one of those of `drop_path`."""
        hidden = self._stage(lambda self, x: self.mlp.input(self.norm2(x)), x)

        def output(self, x, hidden, multiplier):
            return residual(x, self.mlp.output(hidden, self.ls2.gamma[...]), multiplier)

        return self._stage(output, x, hidden, multiplier)

    def _stage(self, function: Callable[..., jax.Array], *inputs: Any) -> jax.Array:
        """function(self, *inputs); with `recompute` only the inputs are saved for backward."""
        if not self.recompute:
            return function(self, *inputs)
        graph, state = nnx.split(self)
        return checkpointed(
            lambda state, *inputs: function(nnx.merge(graph, state), *inputs), state, *inputs
        )


def checkpointed(function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs), with only the inputs saved for the backward pass.

    Unlike this, `jax.checkpoint` rounds named residuals in a separate pass over memory.
    """
    segment = jax.custom_vjp(function)

    def backward(inputs: tuple, gradient: Any) -> tuple:
        # Otherwise the compiler merges the recomputation with the forward pass and saves it.
        inputs = jax.lax.optimization_barrier(inputs)
        return jax.vjp(function, *inputs)[1](gradient)

    segment.defvjp(lambda *inputs: (function(*inputs), inputs), backward)
    return segment(*inputs)


def drop_path(rate: Float[Array, ""] | float, keys: Key[Array, " B"]) -> Float[Array, "2 B 1 1"]:
    """Stochastic-depth multipliers of both residual branches: float32 [2, B, 1, 1]; keys: [B].

    0 with probability `rate`, else 1 / (1 - rate), so that the mean is 1.
    """
    draw = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, (2,)), out_axes=1)
    return draw(keys)[..., None, None] / (1 - rate)


def residual(
    x: Float[Array, "B N C"],
    branch: Float[Array, "B N C"],
    multiplier: Float[Array, "B 1 1"] | None,
) -> Float[Array, "B N C"]:
    """x + branch, or x + branch * multiplier if that is given."""
    return x + (branch if multiplier is None else (branch * multiplier).astype(x.dtype))


class AttentionPool(nnx.Module):
    """Attention pooling with the mean of all tokens as the query: [B, N, C] -> [B, out]."""

    def __init__(self, width: int, out: int, heads: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm_q = LayerNorm(width, rngs=rngs)
        self.norm_k = LayerNorm(width, rngs=rngs)
        self.norm_v = LayerNorm(width, rngs=rngs)
        self.q = Linear(width, width, dtype=dtype, rngs=rngs)
        self.k = Linear(width, width, dtype=dtype, rngs=rngs)
        self.v = Linear(width, width, dtype=dtype, rngs=rngs)
        self.proj = Linear(width, out, dtype=dtype, rngs=rngs)
        self.heads = heads

    def __call__(
        self,
        x: Float[Array, "B N C"],
        valid: Bool[Array, "B N"] | None,
        size: Float[Array, "B N"] | None = None,
    ) -> Float[Array, "B out"]:
        """Clip vectors, float32 [B, out], of tokens [B, N, C].

        valid: bool [B, N] or None; size: as in `size_bias`, also weights the mean.
        """
        share: jax.Array | int = (
            1 if size is None else (size / jnp.mean(size, axis=1, keepdims=True))[..., None]
        )
        q, k = self.query(x * share, valid), self._heads(self.k(self.norm_k(x)))
        v = self._heads(self.v(self.norm_v(x)))
        mask = None if valid is None else valid[:, None, None]
        pooled = jax.nn.dot_product_attention(q, k, v, size_bias(size), mask)
        return self.proj(pooled.reshape(x.shape[0], -1)).astype(jnp.float32)

    def query(
        self, x: Float[Array, "B N C"], valid: Bool[Array, "B N"] | None
    ) -> Float[Array, "B 1 heads D"]:
        """The query of each head, from the mean of x, [B, N, C]: [B, 1, heads, D]."""
        where = None if valid is None else valid[..., None]
        mean = jnp.mean(x, axis=1, keepdims=True, where=where, dtype=jnp.float32)
        return self._heads(self.q(self.norm_q(mean)))

    def weights(
        self, x: Float[Array, "B N C"], valid: Bool[Array, "B N"] | None
    ) -> Float[Array, "B N"]:
        """Attention weight of each token, averaged over the heads: float32 [B, N].

        The weights of a clip add up to 1.
        """
        q, k = self.query(x, valid), self._heads(self.k(self.norm_k(x)))
        logits = jnp.einsum("bqhk,bnhk->bhn", q, k, preferred_element_type=jnp.float32)
        where = None if valid is None else valid[:, None]
        return jnp.mean(jax.nn.softmax(logits / q.shape[-1] ** 0.5, where=where), axis=1)

    def _heads(self, x: jax.Array) -> jax.Array:
        """[B, N, C] -> [B, N, heads, D]."""
        return rearrange(x, "b n (h d) -> b n h d", h=self.heads)


class AlignProjector(nnx.Module):
    """Linear, LayerNorm, L2 normalization: aligns a smaller budget's vector with the largest's."""

    def __init__(self, width: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.head = Linear(width, width, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, rngs=rngs)

    def __call__(self, x: Float[Array, "B C"]) -> Float[Array, "B C"]:
        return l2_normalize(self.norm(self.head(x)).astype(jnp.float32))


def l2_normalize(x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
    """x divided by its Euclidean norm along the last axis."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-24))


def graphdef(make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.GraphDef:
    """The structure of a module, without computing any parameter."""
    return nnx.split(jax.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)[0]


def stack(count: int, rngs: nnx.Rngs, make: Callable[[nnx.Rngs], Module]) -> Module:
    """`count` modules as one, each parameter with a leading axis."""
    return nnx.split_rngs(splits=count)(nnx.vmap(make))(rngs)


def unstack(stacked: Module, index: int) -> Module:
    """Module `index` of a stack made by `stack`."""
    graph, state = nnx.split(stacked)
    return nnx.merge(graph, layer(state, index))


def layer(stacked: Any, index: int) -> Any:
    """Layer `index` of arrays [K, ...], or of tuples of K arrays (`fluxvit.prepare_params`)."""
    return jax.tree.map(lambda leaf: leaf[index], stacked, is_leaf=lambda x: isinstance(x, tuple))
