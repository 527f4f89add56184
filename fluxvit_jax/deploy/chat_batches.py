"""Answers of a language model to several prompts at once, each about a video of its own.

Prompts are padded on the left, so that all answers begin in the same slot, and to a multiple of
`PROMPT_STEP` tokens, so that few programs are compiled. A text that has ended waits for the others,
and no text sees another one or padding: its answer is that which it would get alone.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Wrapped

from fluxvit_jax.data.chat_templates import VIDEO
from fluxvit_jax.distributed.mesh import compiler_options, put_rows, replicated, traced_on_mesh
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import fluxvit, language_model
from fluxvit_jax.models.arrays import take_rows
from fluxvit_jax.models.language_model import (
    NOT_FINITE,
    LanguageModel,
    LanguageModelConfig,
    likeliest,
)
from fluxvit_jax.objectives.next_token_loss import with_video

PROMPT_STEP = 64  # tokens
ENDED = -1  # in place of a token after the last one of an answer

Tree = dict[str, Any]


def answer_ids(
    config: LanguageModelConfig,
    params: Tree,
    mesh: Mesh,
    videos: jax.Array,
    lengths: np.ndarray,
    prompts: Sequence[np.ndarray | None],
    answer_tokens: int,
    ends: Sequence[int],
) -> list[list[int]]:
    """The ids of the answers, the likeliest ones, without those that end them; [] for no prompt.

    Args:
      params: of the language model, on the mesh.
      videos: what it reads of each video, [B, N, D]; lengths: int [B], how much of it is real.
      prompts: ids of each, one of which is `VIDEO`; None for a row that is only padding.
      answer_tokens: of an answer, at most; fewer where the model's context ends.
      ends: the ids that end an answer.

    Raises UserError if scores of tokens are not finite numbers.
    """
    longest = max((len(ids) for ids in prompts if ids is not None), default=1)
    T = -(-longest // PROMPT_STEP) * PROMPT_STEP
    text = np.zeros((len(prompts), T), np.int32)
    begin = np.full(len(prompts), T - 1, np.int32)  # of padding alone the last token is real
    place, limit = begin.copy(), np.zeros(len(prompts), np.int32)
    for row, ids in enumerate(prompts):
        if ids is None:
            continue
        begin[row] = T - len(ids)
        text[row, begin[row] :] = np.where(ids == VIDEO, 0, ids)
        place[row] = begin[row] + np.argmax(ids == VIDEO)
        limit[row] = config.context - (len(ids) - 1 + lengths[row])
    program = _program(config, mesh, answer_tokens, tuple(ends))
    arrays = (text, place, begin, limit, lengths.astype(np.int32))
    found = np.asarray(program(params, videos, *(put_rows(x, mesh) for x in arrays)))
    check_tokens(found)
    return [[int(token) for token in row if token != ENDED] for row in found]


def check_tokens(ids: int | np.ndarray) -> None:
    """Raises UserError if one of the tokens is `NOT_FINITE`."""
    if np.any(np.equal(ids, NOT_FINITE)):
        raise UserError(
            "the language model's scores are no finite numbers: its weights, or those of the video "
            "encoder, are damaged or too large for the dtype"
        )


@lru_cache
def _program(
    config: LanguageModelConfig, mesh: Mesh, answer_tokens: int, ends: tuple[int, ...]
) -> Wrapped:
    """The jitted program: (params, videos, text, place, ..) -> ids int32 [B, answer_tokens].

    text: int32 [B, T]; place: of the video in it; begin: of the first token after padding; limit:
    the most tokens of each answer; lengths: of the videos. All but the text are int32 [B].
    """

    def answers(
        params: Tree,
        videos: jax.Array,
        text: jax.Array,
        place: jax.Array,
        begin: jax.Array,
        limit: jax.Array,
        lengths: jax.Array,
    ) -> jax.Array:
        model: LanguageModel = fluxvit.from_params(language_model.graphdef(config), params)
        x = with_video(model.embed(text), videos, place, lengths)
        B, S, _ = x.shape
        padding = videos.shape[1] - lengths  # at the end; it is moved to the beginning
        x = take_rows(x, (jnp.arange(S) - padding[:, None]) % S)
        hidden, memory = model.extend(x, model.new_cache(begin + padding, S + answer_tokens))

        def found_at(number: int | jax.Array, hidden: jax.Array, ended: jax.Array) -> tuple:
            """The next token, and whether each text has ended before it."""
            token = likeliest(model.logits(hidden[:, -1]))
            return token, ended | jnp.isin(token, jnp.array(ends)) | (number >= limit)

        def goes_on(state: tuple) -> jax.Array:
            number, _, ended, *_ = state
            return (number < answer_tokens) & ~jnp.all(ended)

        def step(state: tuple) -> tuple:
            number, token, ended, ids, memory = state
            hidden, memory = model.extend(model.embed(token[:, None]), memory)
            token, ended = found_at(number, hidden, ended)
            ids = ids.at[:, number].set(jnp.where(ended, ENDED, token))
            return number + 1, token, ended, ids, memory

        token, ended = found_at(0, hidden, jnp.zeros(B, bool))
        ids = jnp.full((B, answer_tokens), ENDED).at[:, 0].set(jnp.where(ended, ENDED, token))
        return jax.lax.while_loop(goes_on, step, (1, token, ended, ids, memory))[3]

    return jax.jit(
        traced_on_mesh(answers, mesh),
        out_shardings=replicated(mesh),
        compiler_options=compiler_options(mesh),
    )
