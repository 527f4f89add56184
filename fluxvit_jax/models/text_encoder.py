"""The text encoder of Flux-CLIP: token ids in, one vector a text out.

It is MobileCLIP-B's text tower, as InternVideo2 CLIP S and B use it. Source: OpenGVLab's
InternVideo, InternVideo2/multi_modality, models/backbones/internvideo2/mobileclip.
"""

from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Float, Int

from fluxvit_jax.models import blocks, sharding_constraints
from fluxvit_jax.models.arrays import Array


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """The encoder's shape; the default is MobileCLIP-B's.

    hidden: width inside the MLP; context: tokens of the position table; out: width of a vector.
    """

    width: int = 512
    depth: int = 12
    heads: int = 8
    hidden: int = 2048
    context: int = 77
    vocabulary: int = 49408
    out: int = 512
    dtype: str = "float32"


class TextEncoder(nnx.Module):
    """The encoder, for deterministic forward passes."""

    def __init__(self, config: TextEncoderConfig, rngs: nnx.Rngs):
        self.config = config
        C, dtype = config.width, jnp.dtype(config.dtype)
        # Of our choice: the official encoder is loaded, never trained from these.
        normal = nnx.initializers.normal(C**-0.5)
        self.token_embed = nnx.Param(normal(rngs.params(), (config.vocabulary, C)))
        self.pos_embed = nnx.Param(normal(rngs.params(), (config.context, C)))
        self.blocks = blocks.stack(config.depth, rngs, partial(TextBlock, config))
        self.norm = blocks.LayerNorm(C, rngs=rngs)
        self.projection = nnx.Param(normal(rngs.params(), (C, config.out)))
        self.dtype = dtype

    def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B out"]:
        """Vectors of texts, float32, not normalized.

        The vector is read at the largest id, the first one of several: the end token. What follows
        it does not matter, since tokens see only those before them; padding is not masked.
        """
        x = self.tokens(ids)
        ends = jnp.argmax(ids, axis=1)
        x = jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0]
        return (x @ self.projection[...].astype(self.dtype)).astype(jnp.float32)

    def tokens(self, ids: Int[Array, "B L"]) -> Float[Array, "B L C"]:
        """Every token after the last norm."""
        graph, stacked = nnx.split(self.blocks)

        def body(x: jax.Array, state: nnx.State) -> tuple[jax.Array, None]:
            return nnx.merge(graph, state)(x), None

        x, _ = jax.lax.scan(body, self.embed(ids), stacked)
        return self.norm(x).astype(self.dtype)

    def embed(self, ids: Int[Array, "B L"]) -> Float[Array, "B L C"]:
        """Embeddings of tokens and their positions.

        The position table is resized to another length, as the official code does; not cut.
        """
        table, length = self.pos_embed[...], ids.shape[1]
        if length != len(table):
            shape = (length, table.shape[1])
            table = jax.image.resize(table, shape, "linear", antialias=False)
        x = sharding_constraints.constrain_batch(self.token_embed[...][ids])
        return (x + table).astype(self.dtype)


class TextBlock(nnx.Module):
    """A pre-norm transformer block in which a token sees itself and those before it."""

    def __init__(self, config: TextEncoderConfig, rngs: nnx.Rngs):
        C, dtype = config.width, jnp.dtype(config.dtype)
        self.norm1 = blocks.LayerNorm(C, rngs=rngs)
        self.qkv = blocks.Linear(C, 3 * C, dtype=dtype, rngs=rngs)
        self.proj = blocks.Linear(C, C, dtype=dtype, rngs=rngs)
        self.norm2 = blocks.LayerNorm(C, rngs=rngs)
        self.fc1 = blocks.Linear(C, config.hidden, dtype=dtype, rngs=rngs)
        self.fc2 = blocks.Linear(config.hidden, C, dtype=dtype, rngs=rngs)
        self.heads = config.heads

    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        qkv = rearrange(self.qkv(self.norm1(x)), "b l (s h d) -> s b l h d", s=3, h=self.heads)
        attended = jax.nn.dot_product_attention(*qkv, is_causal=True)
        x = x + self.proj(rearrange(attended, "b l h d -> b l (h d)"))
        return x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))


def unit_vectors(
    config: TextEncoderConfig, params: dict, ids: Int[Array, "B L"]
) -> Float[Array, "B out"]:
    """Vectors of texts by an encoder's parameters, of length 1."""
    encoder: TextEncoder = nnx.merge(_graphdef(config), nnx.State(params))
    return blocks.l2_normalize(encoder(jnp.asarray(ids)))


@cache
def _graphdef(config: TextEncoderConfig) -> nnx.GraphDef:
    return blocks.graphdef(partial(TextEncoder, config))
