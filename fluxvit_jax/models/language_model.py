"""A decoder-only language model: Qwen2, Qwen2.5, Qwen3 or Llama, by its config.

Embeddings come from outside, so that a video's tokens can stand between those of a text, and
gradients pass through to them. Source: `modeling_qwen2.py`, `modeling_qwen3.py` and
`modeling_llama.py` of Hugging Face Transformers, whose weights it reads
(`fluxvit_jax.convert.language_model_files`).
"""

from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Float, Int, Int32

from fluxvit_jax.models import blocks, sharding_constraints
from fluxvit_jax.models.arrays import Array

NOT_FINITE = -2  # in place of a token whose score is no finite number


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """The model's shape.

    kv_heads: heads of keys and values, which groups of query heads share; head_size: channels of a
    head; hidden: width inside the MLP; context: positions that the model was trained for;
    rope_theta: base of the rotary embedding's wavelengths; epsilon: of RMSNorm; qkv_bias: whether
    queries, keys and values have biases (Qwen2); qk_norm: whether each head of queries and keys is
    normalized (Qwen3); tied: whether the output layer is the embedding table.
    """

    width: int
    depth: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    vocabulary: int
    context: int
    rope_theta: float
    epsilon: float
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    dtype: str = "float32"

    def in_dtype(self, dtype: str) -> "LanguageModelConfig":
        """The same model with another compute dtype."""
        return LanguageModelConfig(**{**vars(self), "dtype": dtype})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """Keys and values of the tokens so far.

    keys, values: [depth, B, L, kv_heads, head_size], of which `length` slots are filled, a scalar
    int32; begin: int32 [B], the slot of each text's first token, after padding on the left.
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array
    begin: jax.Array


class LanguageModel(nnx.Module):
    """The model. A forward pass is `embed`, `encode` and `logits`."""

    def __init__(self, config: LanguageModelConfig, rngs: nnx.Rngs):
        self.config = config
        C, dtype = config.width, jnp.dtype(config.dtype)
        self.token_embed = nnx.Param(blocks.kernel_init(rngs.params(), (config.vocabulary, C)))
        self.layers = blocks.stack(config.depth, rngs, partial(DecoderLayer, config))
        self.norm = DecoderNorm(C, config.epsilon)
        if not config.tied:
            self.output = blocks.Linear(
                C, config.vocabulary, use_bias=False, dtype=dtype, rngs=rngs
            )
        self.dtype = dtype

    def embed(self, ids: Int[Array, "B L"]) -> Float[Array, "B L C"]:
        """Embeddings of tokens, in the compute dtype."""
        return self.token_embed[...][ids].astype(self.dtype)

    def encode(self, x: Float[Array, "B L C"], remat: bool = False) -> Float[Array, "B L C"]:
        """Every token after the last norm; a token sees itself and those before it.

        Padding on the right needs no mask: no token of the text sees it. remat: whether the
        backward pass computes each layer again, so that only its input is kept.
        """
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        graph, stacked = nnx.split(self.layers)

        def body(x: jax.Array, state: nnx.State) -> tuple[jax.Array, None]:
            return nnx.merge(graph, state)(x, positions), None

        if remat:
            body = jax.checkpoint(body, prevent_cse=False)
        x, _ = jax.lax.scan(body, x.astype(self.dtype), stacked)
        return self.norm(x)

    def new_cache(self, begin: Int[Array, " B"], length: int) -> Cache:
        """An empty cache for texts of up to `length` tokens, padding on the left included."""
        config = self.config
        shape = (config.depth, begin.shape[0], length, config.kv_heads, config.head_size)
        empty = sharding_constraints.constrain_cache(jnp.zeros(shape, self.dtype))
        return Cache(keys=empty, values=empty, length=jnp.int32(0), begin=begin)

    def extend(self, x: Float[Array, "B L C"], cache: Cache) -> tuple[Float[Array, "B L C"], Cache]:
        """Every new token after the last norm, and the cache with them.

        x: embeddings that follow what is in the cache, which must have room for them.
        """
        slots = cache.length + jnp.arange(x.shape[1])
        positions = jnp.maximum(slots - cache.begin[:, None], 0)
        all_slots = jnp.arange(cache.keys.shape[2])
        visible = (all_slots <= slots[:, None]) & (all_slots >= cache.begin[:, None, None])
        graph, stacked = nnx.split(self.layers)

        def body(x: jax.Array, layer: tuple) -> tuple[jax.Array, tuple]:
            state, *memory = layer
            return nnx.merge(graph, state).extend(x, positions, visible, memory, cache.length)

        layers = (stacked, cache.keys, cache.values)
        x, (keys, values) = jax.lax.scan(body, x.astype(self.dtype), layers)
        length = cache.length + x.shape[1]
        return self.norm(x), Cache(keys=keys, values=values, length=length, begin=cache.begin)

    def logits(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch vocabulary"]:
        """Scores of the next token, float32, of tokens after the last norm."""
        if self.config.tied:
            return (x @ self.token_embed[...].astype(self.dtype).T).astype(jnp.float32)
        return self.output(x).astype(jnp.float32)


def likeliest(scores: Float[Array, "*batch vocabulary"]) -> Int32[Array, "*batch"]:
    """The token with the largest score, `NOT_FINITE` where that is no finite number."""
    largest = jnp.max(scores, axis=-1)  # NaN if one of them is
    token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.isfinite(largest), token, NOT_FINITE)


class DecoderNorm(nnx.Module):
    """RMSNorm in float32, rounded before it is scaled, as in Transformers."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide**2, axis=-1, keepdims=True)
        unit = (wide * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x.dtype)
        return unit * self.scale[...].astype(x.dtype)


class DecoderLayer(nnx.Module):
    """Attention with grouped queries and rotary positions, then a gated MLP."""

    def __init__(self, config: LanguageModelConfig, rngs: nnx.Rngs):
        C, D = config.width, config.head_size
        Linear = partial(blocks.Linear, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.norm1 = DecoderNorm(C, config.epsilon)
        self.q = Linear(C, config.heads * D, use_bias=config.qkv_bias)
        self.k = Linear(C, config.kv_heads * D, use_bias=config.qkv_bias)
        self.v = Linear(C, config.kv_heads * D, use_bias=config.qkv_bias)
        self.q_norm = DecoderNorm(D, config.epsilon) if config.qk_norm else None
        self.k_norm = DecoderNorm(D, config.epsilon) if config.qk_norm else None
        self.proj = Linear(config.heads * D, C, use_bias=False)
        self.norm2 = DecoderNorm(C, config.epsilon)
        self.gate = Linear(C, config.hidden, use_bias=False)
        self.up = Linear(C, config.hidden, use_bias=False)
        self.down = Linear(config.hidden, C, use_bias=False)
        self.head_size, self.theta = D, config.rope_theta

    def __call__(
        self, x: Float[Array, "B L C"], positions: Int[Array, "B L"]
    ) -> Float[Array, "B L C"]:
        """positions: of the tokens in their texts."""
        x = sharding_constraints.constrain_batch(x)
        q, k, v = self._qkv(x, positions)
        return self._output(x, jax.nn.dot_product_attention(q, k, v, is_causal=True))

    def extend(
        self,
        x: Float[Array, "B L C"],
        positions: Int[Array, "B L"],
        visible: jax.Array,
        memory: list[jax.Array],
        length: jax.Array,
    ) -> tuple[Float[Array, "B L C"], tuple[jax.Array, jax.Array]]:
        """The new tokens, and the layer's keys and values with theirs after `length` others.

        visible: bool [B, L, slots]; memory: keys and values, [B, slots, kv_heads, head_size].
        """
        x = sharding_constraints.constrain_batch(x)
        q, *new = self._qkv(x, positions)
        k, v = (
            jax.lax.dynamic_update_slice_in_dim(old, added, length, axis=1)
            for old, added in zip(memory, new, strict=True)
        )
        attended = jax.nn.dot_product_attention(q, k, v, mask=visible[:, None])
        return self._output(x, attended), (k, v)

    def _qkv(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = self.norm1(x)
        q, k, v = (
            rearrange(linear(x), "b l (h d) -> b l h d", d=self.head_size)
            for linear in (self.q, self.k, self.v)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, positions, self.theta), rotate(k, positions, self.theta), v

    def _output(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        x = x + self.proj(rearrange(attended, "b l h d -> b l (h d)"))
        hidden = self.norm2(x)
        return x + self.down(jax.nn.silu(self.gate(hidden)) * self.up(hidden))


def rotate(
    x: Float[Array, "B L heads D"], positions: Int[Array, "B L"], theta: float
) -> Float[Array, "B L heads D"]:
    """Rotary position embedding: channels i and i + D/2 turn by position / theta^(2i/D)."""
    half = x.shape[-1] // 2
    wavelengths = theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) / wavelengths
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


@cache
def graphdef(config: LanguageModelConfig) -> nnx.GraphDef[LanguageModel]:
    """The model's structure, without computing any parameter."""
    return blocks.graphdef(partial(LanguageModel, config))
