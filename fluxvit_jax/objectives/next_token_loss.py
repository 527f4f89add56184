"""The loss of a language model that reads a video's tokens in a text.

Source: OpenGVLab's VideoChat-Flash, llava/model/llava_arch.py
(prepare_inputs_labels_for_multimodal), and `ForCausalLMLoss` of Hugging Face Transformers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float, Int

from fluxvit_jax.models.arrays import Array, take_rows

# Texts are scored by as many tokens at a time, as their scores of 150,000 words are large.
SCORED_TOKENS = 32


def with_video(
    text: Float[Array, "B T C"],
    video: Float[Array, "B K C"],
    place: Int[Array, " B"],
    length: Int[Array, " B"] | None = None,
) -> Float[Array, "B S C"]:
    """Texts with a video's K tokens instead of the token at `place`: [B, T - 1 + K, C].

    length: of each video, if only its first tokens are real; as many slots at the end are then of
    no meaning.
    """
    T, K = text.shape[1], video.shape[1]
    slots, first = jnp.arange(T - 1 + K), place[:, None]
    lengths = K if length is None else length[:, None]
    in_video = (slots >= first) & (slots < first + lengths)
    from_text = jnp.where(slots < first, slots, jnp.clip(slots - lengths + 1, 0, T - 1))
    from_video = jnp.clip(slots - first, 0, K - 1)
    return jnp.where(in_video[..., None], take_rows(video, from_video), take_rows(text, from_text))


def answer_scores(
    hidden: Float[Array, "B S C"],
    labels: Int[Array, "B T"],
    place: Int[Array, " B"],
    logits: Callable[[jax.Array], jax.Array],
    length: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Sums of cross entropies over each text's labels, and how many of them are the likeliest.

    hidden: tokens of `with_video` after the language model's last norm; labels: of the text's
    tokens, below 0 where none is; logits: tokens to scores, float32. Scores are computed of the
    tokens before those of the text alone, never of those within the video. length: as there.
    """
    T = labels.shape[1]
    K = hidden.shape[1] - T + 1 if length is None else length[:, None]
    tokens = jnp.arange(T)
    slots = tokens + jnp.where(tokens > place[:, None], K - 1, 0)
    before = take_rows(hidden, jnp.maximum(slots - 1, 0))
    counted = jnp.where(tokens > 0, labels, -1)  # nothing foretells the first token

    @jax.checkpoint
    def score(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, labels = part
        scores = jax.nn.log_softmax(logits(hidden))
        own = jnp.take_along_axis(scores, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        hits = (jnp.argmax(scores, axis=-1) == labels) & (labels >= 0)
        return -jnp.sum(own, axis=1, where=labels >= 0), jnp.sum(hits, axis=1, dtype=jnp.float32)

    padding = ((0, 0), (0, -T % SCORED_TOKENS))
    before = jnp.pad(before, (*padding, (0, 0)))
    counted = jnp.pad(counted, padding, constant_values=-1)
    parts = [rearrange(x, "b (n t) ... -> n b t ...", t=SCORED_TOKENS) for x in (before, counted)]
    losses, hits = jax.lax.map(score, tuple(parts))
    return jnp.sum(losses, axis=0), jnp.sum(hits, axis=0)


def labels_counted(labels: Int[Array, "B T"]) -> Float[Array, ""]:
    """The number of labels that `answer_scores` counts; at least 1."""
    return jnp.maximum(jnp.sum(labels[:, 1:] >= 0), 1).astype(jnp.float32)
