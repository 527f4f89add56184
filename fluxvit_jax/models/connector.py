"""The projector from FluxViT's tokens to the embeddings of a language model.

Tokens are merged, most similar first (ToMe, arXiv 2210.09461), and mapped by two linear layers.
Source: OpenGVLab's VideoChat-Flash, llava/model/multimodal_projector/tome16_mlp_hd64.py. There a
frame grid is merged; here the tokens that a budget keeps, which are none, so how many remain is
told by their number and not by that of the frames.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from fluxvit_jax.models import blocks
from fluxvit_jax.models.arrays import Array, take_rows


class Connector(nnx.Module):
    """Two linear layers with GELU (erf) between."""

    def __init__(self, width: int, out: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.fc1 = blocks.Linear(width, out, dtype=dtype, rngs=rngs)
        self.fc2 = blocks.Linear(out, out, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Float[Array, "B N C"]) -> Float[Array, "B N out"]:
        return self.fc2(jax.nn.gelu(self.fc1(tokens), approximate=False))


class Merged(NamedTuple):
    """Tokens that stand for others.

    tokens: [B, K, C], means of what they stand for; sizes: float32 [B, K], how many that are;
    position: int32 [B, K], the one of each that the others were merged into; frame: float32 [B, K],
    the mean frame.
    """

    tokens: jax.Array
    sizes: jax.Array
    position: jax.Array
    frame: jax.Array


def merge(
    tokens: Float[Array, "B N C"],
    keep: int,
    heads: int,
    frame: Int[Array, "B N"] | None = None,
) -> Merged:
    """Merges tokens until `keep` are left, in the official order.

    That is: in each step, those that were not merged by falling similarity, then those that others
    could be merged into. heads: of the encoder; tokens are compared by the mean of their heads;
    frame: of each token, if it matters.

    Raises ValueError for more tokens than there are.
    """
    B, N, _ = tokens.shape
    if not 0 < keep <= N:
        raise ValueError(f"{N} tokens cannot be merged into {keep}")
    position = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, N))
    frames = jnp.zeros((B, N)) if frame is None else jnp.asarray(frame, jnp.float32)
    merged = Merged(tokens, jnp.ones((B, N), jnp.float32), position, frames)
    for count in merge_plan(N, keep):
        merged = _merge_step(merged, count, heads)
    return merged


def in_order(merged: Merged) -> Merged:
    """Tokens in the order that they had before they were merged."""
    order = jnp.argsort(merged.position, axis=1)
    return Merged(*(take_rows(x, order) for x in merged))


def by_frame(merged: Merged) -> Merged:
    """Tokens in the order of the frames that their means are nearest to, then as `in_order`."""
    merged = in_order(merged)
    order = jnp.argsort(nearest_frame(merged), axis=1, stable=True)
    return Merged(*(take_rows(x, order) for x in merged))


def nearest_frame(merged: Merged) -> Int[Array, "B K"]:
    """The frame that the mean of each token is nearest to, from 0."""
    return jnp.floor(merged.frame + 0.5).astype(jnp.int32)


def merge_plan(tokens: int, keep: int) -> list[int]:
    """Tokens that go in each step: half of them, or fewer in the last one."""
    plan = []
    while tokens > keep:
        plan.append(min(tokens - keep, tokens // 2))
        tokens -= plan[-1]
    return plan


def _merge_step(merged: Merged, count: int, heads: int) -> Merged:
    """Merges the `count` even tokens that are the most similar to an odd one into that one."""
    unit = blocks.l2_normalize(_mean_of_heads(merged.tokens, heads))
    # By default accelerators multiply float32 in lower precision and would merge other tokens.
    similarity = jnp.einsum(
        "bic,bjc->bij", unit[:, ::2], unit[:, 1::2], precision=jax.lax.Precision.HIGHEST
    )
    partner = jnp.argmax(similarity, axis=2)
    even, odd = (Merged(*(x[:, first::2] for x in merged)) for first in range(2))
    rest = Merged(*(x[:, :0] for x in even))
    if count < partner.shape[1]:  # otherwise all go, in whatever order; sorting is slow on TPUs
        # Stable, so that ties do not depend on the platform.
        order = jnp.argsort(-jnp.max(similarity, axis=2), axis=1, stable=True)
        rest = Merged(*(take_rows(x, order[:, count:]) for x in even))
        even = Merged(*(take_rows(x, order[:, :count]) for x in even))
        partner = take_rows(partner, order[:, :count])
    sizes = _add_at(odd.sizes, partner, even.sizes)
    sums = _add_at(_weighted(odd), partner, _weighted(even))
    frames = _add_at(odd.frame * odd.sizes, partner, even.frame * even.sizes) / sizes
    means = (sums / sizes[..., None]).astype(merged.tokens.dtype)
    into = Merged(means, sizes, odd.position, frames)
    return Merged(*(jnp.concatenate(pair, axis=1) for pair in zip(rest, into, strict=True)))


def _mean_of_heads(tokens: Float[Array, "B N C"], heads: int) -> Float[Array, "B N D"]:
    split = rearrange(tokens.astype(jnp.float32), "b n (h d) -> b n h d", h=heads)
    return jnp.mean(split, axis=2)


def _weighted(merged: Merged) -> Float[Array, "B N C"]:
    return merged.tokens.astype(jnp.float32) * merged.sizes[..., None]


def _add_at(x: jax.Array, index: Int[Array, "B K"], added: jax.Array) -> jax.Array:
    """x with `added` at an index, more than once where that repeats."""
    return jax.vmap(lambda row, at, new: row.at[at].add(new))(x, index, added)
