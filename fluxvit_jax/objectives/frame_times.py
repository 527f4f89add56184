"""Texts that tell the time of frames, among a video's tokens: "2.5s" before those at 2.5 seconds.

Tokens of a video stand for several places and frames once they are merged; each is taken for one of
the frame that its mean is nearest to. Shapes are static: there is room for the text of every frame,
and what is not needed is left at the end.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Bool, Float, Int

from fluxvit_jax.models.arrays import Array, take_rows


class VideoTokens(NamedTuple):
    """What a language model reads of videos: [B, K, D].

    frame: int32 [B, K], the frame of each, from 0.
    """

    tokens: jax.Array
    frame: jax.Array


def with_times(
    video: VideoTokens, texts: Float[Array, "B T M D"], real: Bool[Array, "B T M"]
) -> tuple[Float[Array, "B S D"], Int[Array, " B"]]:
    """A video's tokens with the text of a frame before those of it, and how many these are.

    S = K + T M; what comes after the number of tokens is of no meaning. Frames without tokens have
    no text either. The tokens of a video are in the order of their frames.

    texts: embeddings of each frame's text; real: False for padding among these.
    """
    T = texts.shape[1]
    is_seen = jnp.any(video.frame[:, None] == jnp.arange(T)[:, None], axis=2)
    real = real & is_seen[..., None]
    # A text comes before the tokens of its frame, and all that is padding at the end.
    text_rank = jnp.where(real, 2 * jnp.arange(T)[:, None], 2 * T)
    ranks = jnp.concatenate([rearrange(text_rank, "b t m -> b (t m)"), 2 * video.frame + 1], axis=1)
    order = jnp.argsort(ranks, axis=1, stable=True)
    joined = jnp.concatenate(
        [rearrange(texts, "b t m d -> b (t m) d"), video.tokens.astype(texts.dtype)], axis=1
    )
    length = video.tokens.shape[1] + jnp.sum(real, axis=(1, 2), dtype=jnp.int32)
    return take_rows(joined, order), length
