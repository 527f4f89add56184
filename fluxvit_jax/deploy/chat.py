"""Questions about a video, answered by a language model that reads FluxViT's tokens.

chat = fluxvit_jax.load_chat("runs/chat")
chat.ask("a.mp4", "What happens?", tokens=512)
video = chat.open("a.mp4", tokens=512)         # encoded once
video.ask("What happens?"), video.ask("And then?")
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fluxvit_jax.convert.config_json import Setting
from fluxvit_jax.data.chat_templates import VIDEO, follow_up_ids, prompt_ids, time_message
from fluxvit_jax.data.chat_texts import time_ids
from fluxvit_jax.data.chat_tokenizer import ChatTokenizer
from fluxvit_jax.data.clips import Clip, read_clip
from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.deploy.chat_batches import PROMPT_STEP, answer_ids, check_tokens
from fluxvit_jax.deploy.chat_encoder import ChatEncoder
from fluxvit_jax.distributed import storage
from fluxvit_jax.distributed.compilation_cache import keep_programs_by_default
from fluxvit_jax.distributed.mesh import mesh_over, put_rows
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import nearest_head
from fluxvit_jax.models import fluxvit, language_model
from fluxvit_jax.models.language_model import Cache, LanguageModel, LanguageModelConfig, likeliest
from fluxvit_jax.objectives import flux_chat, flux_chat_weights
from fluxvit_jax.objectives.flux_chat_weights import ChatWeights
from fluxvit_jax.objectives.frame_times import VideoTokens

ANSWER_TOKENS = 256  # of an answer, at most
CACHE_STEP = 512  # caches are of multiples, so that few programs are compiled

Tree = dict[str, Any]


class FirstQuestion(NamedTuple):
    """A first question about a video.

    answer_start: how the answer begins; what is returned goes on from there. message: what the
    question begins with, such as `chat_templates.time_message`.
    """

    text: str
    answer_start: str = ""
    message: str = ""


def load_chat(
    path: storage.PathLike,
    llm: storage.PathLike = "",
    dtype: str = "float32",
    mesh: Mesh | None = None,
) -> "Chat":
    """The video chat of a run that `configs/chat.py` trained.

    Args:
        path: its workdir or one of its steps.
        llm: folder of the language model, if it is no longer where the run had it.
        dtype: of the computation, "float32" or "bfloat16".
        mesh: the devices that share it, see `distributed.mesh`; by default the first one alone.

    Raises UserError: there are no such weights, or the language model is missing or another one.
    """
    keep_programs_by_default()
    mesh = mesh or mesh_over("fsdp", jax.devices()[:1])
    return Chat(flux_chat_weights.read(path, os.fspath(llm), dtype, mesh), dtype, mesh)


class Chat:
    """Answers questions about videos; compiles once for each grid and budget.

    Attributes:
        encoder: what turns frames into tokens for the language model.
        settings: (tokens, frames, pixels) at which a video is seen, those of the run's evaluation.
        tokenizer: that of the language model.
    """

    def __init__(self, weights: ChatWeights, dtype: str, mesh: Mesh):
        """mesh: that on which the language model of `weights` is."""
        self.encoder = ChatEncoder(weights.projection, dtype, mesh)
        self._llm_config = weights.llm_config
        self._llm, self._mesh = weights.llm, mesh
        self._time_message: bool = weights.projection.config.chat.time_message
        self.tokenizer = ChatTokenizer(weights.llm_folder)
        self.settings: list[Setting] = [
            tuple(one) for one in weights.projection.config.eval.settings
        ]

    def ask(
        self,
        video: str | os.PathLike,
        question: str,
        tokens: int | None = None,
        answer_tokens: int = ANSWER_TOKENS,
    ) -> str:
        """The answer to a question about a video; see `open` and `Conversation.stream`."""
        return self.open(video, tokens).ask(question, answer_tokens)

    def ask_each(
        self,
        clips: np.ndarray,
        questions: Sequence[FirstQuestion | None],
        tokens: int,
        answer_tokens: int = ANSWER_TOKENS,
        times: Sequence[np.ndarray | None] | None = None,
    ) -> list[str | UserError]:
        """The answers to one question about each of several clips, as `Conversation.ask` gives it.

        A question that is too long for the language model has an error in place of an answer, and
        None, for a clip that only fills the batch, has "".

        clips: uint8 [B, T, side, side, 3]; tokens: the budget; times: of the frames of each, as in
        `about`. A new B, T, side or budget compiles a new program.

        Raises UserError for a budget below `chat.merge`.
        """
        videos, lengths = self._read(clips, tokens, times or [None] * len(clips))
        prompts = [self._first_prompt(own) if own else None for own in questions]
        errors: dict[int, UserError] = {}
        for row, ids in enumerate(prompts):
            try:
                if ids is not None:
                    self.check_length(len(ids) - 1 + int(lengths[row]), int(lengths[row]))
            except UserError as error:
                errors[row], prompts[row] = error, None
        found = answer_ids(
            self._llm_config,
            self._llm,
            self._mesh,
            videos,
            lengths,
            prompts,
            answer_tokens,
            self.tokenizer.end_tokens,
        )
        texts = ["".join(self.tokenizer.stream(ids)) for ids in found]
        return [errors.get(row, text) for row, text in enumerate(texts)]

    def _read(
        self, clips: np.ndarray, tokens: int, times: Sequence[np.ndarray | None]
    ) -> tuple[jax.Array, np.ndarray]:
        """What the language model reads of clips, [B, N, D], and how much of each is real, [B]."""
        video, (B, T) = self.encoder.encode(clips, tokens), clips.shape[:2]
        if not self.encoder.frame_times:
            return video.tokens, np.full(B, video.tokens.shape[1])
        unknown = np.zeros(T)
        ids = [time_ids(unknown if own is None else own, self.tokenizer, T) for own in times]
        read, lengths = _with_times(
            self._llm_config, self._llm, video, put_rows(np.stack(ids), self._mesh)
        )
        return read, np.asarray(lengths)

    def _first_prompt(self, question: FirstQuestion) -> np.ndarray:
        """The ids after which an answer goes on."""
        tokenizer = self.tokenizer
        ids = prompt_ids([], question.text, tokenizer, question.message)
        start = tokenizer.encode(tokenizer.no_thoughts + question.answer_start)
        return np.concatenate([ids, np.array(start, np.int32)])

    def check_length(self, length: int, of_video: int) -> None:
        """Raises UserError if nothing fits into the language model after a prompt of `length`.

        of_video: how many of its tokens are of the video.
        """
        context = self._llm_config.context
        if length < context:
            return
        # Video tokens, before they are merged, with which half of the context would be left.
        fitting = max(context // 2 - (length - of_video), 1) * self.encoder.merge
        raise UserError(
            f"the conversation is too long: {length} tokens, {of_video} of them of the "
            f"video, where the language model takes {context} with the answer; ask for fewer "
            f"tokens of the video, such as --tokens={fitting}, or begin again"
        )

    def open(self, video: str | os.PathLike, tokens: int | None = None) -> "Conversation":
        """A conversation about a video, which is read and encoded here and not again.

        tokens: the budget, on the grid of the nearest of `settings`; by default the first of them.

        Raises UserError: a file that is no video, or a budget below `chat.merge`.
        """
        clip, message = self.read(video, tokens)
        return self.about(clip.frames, self.setting(tokens)[0], message, clip.times)

    def read(self, video: str | os.PathLike, tokens: int | None = None) -> tuple[Clip, str]:
        """What `open` shows of a video, and what its first question begins with.

        Raises UserError: a file that is no video.
        """
        _, frames, resolution = self.setting(tokens)
        try:
            with Video(video) as opened:
                clip = read_clip(opened, frames, resolution)
                seconds = len(opened) / opened.frame_rate if opened.frame_rate else 0.0
        except DecodeError as error:
            raise UserError(str(error)) from error
        is_told = seconds and self._time_message
        return clip, time_message(seconds, frames, training=False) if is_told else ""

    def about(
        self,
        frames: np.ndarray,
        tokens: int,
        message: str = "",
        times: np.ndarray | None = None,
    ) -> "Conversation":
        """A conversation about frames, uint8 [T, side, side, 3], at a budget.

        message: what the first question begins with, such as `chat_templates.time_message`; times:
        the second of each frame, which `chat.frame_times` has told; without them no time is.

        Raises UserError for a budget below `chat.merge`.
        """
        read, (length,) = self._read(frames[None], tokens, [times])
        return Conversation(self, read[0, :length], message)

    def setting(self, tokens: int | None) -> Setting:
        """(tokens, frames, pixels) at which a video is seen; see `open`."""
        if tokens is None:
            return self.settings[0]
        nearest = nearest_head(tokens, [budget for budget, *_ in self.settings])
        return (tokens, *self.settings[nearest][1:])


class Conversation:
    """Questions and answers about one video, each with all before it in mind.

    Attributes:
        history: the questions so far, with their answers, but for those that were refused.
        tokens: what the language model reads of the video, [N, D], with the texts of
            `chat.frame_times`.
    """

    def __init__(self, chat: Chat, tokens: jax.Array, message: str = ""):
        self._chat, self.tokens, self._message = chat, tokens, message
        model = _model(chat._llm_config, chat._llm)
        self._cache = model.new_cache(jnp.zeros(1, jnp.int32), 0)
        self._unread: list[int] = []  # the last token of an answer, which nothing followed yet
        self.history: list[tuple[str, str]] = []

    def ask(self, question: str, answer_tokens: int = ANSWER_TOKENS, answer_start: str = "") -> str:
        """The answer to a question; arguments and errors as in `stream`."""
        return "".join(self.stream(question, answer_tokens, answer_start))

    def stream(
        self, question: str, answer_tokens: int = ANSWER_TOKENS, answer_start: str = ""
    ) -> Iterator[str]:
        """The answer, piece by piece, of up to `answer_tokens` tokens: the likeliest ones.

        It is shorter where the language model takes no more. answer_start: how it begins; what is
        returned goes on from there.

        Raises UserError if the language model takes not even the question, or its scores are no
        finite numbers.
        """
        ids = self._answer(question, answer_tokens, answer_start)
        pieces: list[str] = []
        try:
            for piece in self._chat.tokenizer.stream(ids):
                pieces.append(piece)
                yield piece
        finally:  # whoever has heard enough may ask on
            self.history.append((question, answer_start + "".join(pieces)))

    def _answer(self, question: str, answer_tokens: int, answer_start: str = "") -> Iterator[int]:
        """The ids of an answer after its start, without the one that ends it.

        Raises UserError at once if the language model takes not even the question, which then
        leaves no trace in the conversation.
        """
        chat, embeddings = self._chat, self._prompt(question)
        if start := chat.tokenizer.encode(chat.tokenizer.no_thoughts + answer_start):
            begun = _embed(chat._llm_config, chat._llm, np.array(start))
            embeddings = jnp.concatenate([embeddings, begun])
        length = int(self._cache.length) + len(embeddings)
        answer_tokens = self._make_room(length, answer_tokens)
        padded = jnp.pad(embeddings, ((0, -len(embeddings) % PROMPT_STEP), (0, 0)))[None]
        last = jnp.int32(len(embeddings))
        token, self._cache = _read(chat._llm_config, chat._llm, padded, last, self._cache)
        self._unread = []
        return self._continued(token, answer_tokens)

    def _continued(self, token: jax.Array, answer_tokens: int) -> Iterator[int]:
        """The ids of an answer from its first token on, without the one that ends it."""
        chat = self._chat
        for number in range(answer_tokens):
            found = int(token)
            check_tokens(found)
            self._unread = [found]
            if found in chat.tokenizer.end_tokens:
                self._unread = []  # a follow-up begins with the token that ends an answer
                return
            yield found
            if number + 1 < answer_tokens:
                token, self._cache = _follow(chat._llm_config, chat._llm, token, self._cache)

    def _prompt(self, question: str) -> jax.Array:
        """Embeddings that go before an answer: [L, D]."""
        chat = self._chat
        if int(self._cache.length):
            ids = follow_up_ids(question, chat.tokenizer)
            return _embed(chat._llm_config, chat._llm, np.concatenate([self._unread, ids]))
        ids = prompt_ids([], question, chat.tokenizer, self._message)
        place = int(np.argmax(ids == VIDEO))
        before, after = (
            _embed(chat._llm_config, chat._llm, part) for part in (ids[:place], ids[place + 1 :])
        )
        return jnp.concatenate([before, self.tokens.astype(before.dtype), after])

    def _make_room(self, length: int, answer_tokens: int) -> int:
        """Enlarges the cache for a prompt that ends at `length` and an answer; returns the latter.

        That is `answer_tokens`, or what the language model still takes.
        """
        self._chat.check_length(length, len(self.tokens))
        answer_tokens = min(answer_tokens, self._chat._llm_config.context - length)
        needed = length + PROMPT_STEP + answer_tokens
        missing = needed - self._cache.keys.shape[2]
        if missing > 0:
            grow = ((0, 0), (0, 0), (0, missing + -needed % CACHE_STEP), (0, 0), (0, 0))
            self._cache = replace(
                self._cache,
                keys=jnp.pad(self._cache.keys, grow),
                values=jnp.pad(self._cache.values, grow),
            )
        return answer_tokens


# ---------------------------------------------------------------------------------------------
# Compiled programs


def _model(config: LanguageModelConfig, params: Tree) -> LanguageModel:
    return fluxvit.from_params(language_model.graphdef(config), params)


def _embed(config: LanguageModelConfig, params: Tree, ids: np.ndarray) -> jax.Array:
    """Embeddings [L, D] of ids, int [L]."""
    return _model(config, params).embed(jnp.asarray(ids, jnp.int32)[None])[0]


@partial(jax.jit, static_argnums=0)
def _with_times(
    config: LanguageModelConfig, params: Tree, video: VideoTokens, times: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As `flux_chat.with_times_of`."""
    return flux_chat.with_times_of(_model(config, params), video, times)


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _read(
    config: LanguageModelConfig, params: Tree, x: jax.Array, count: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """The token after a prompt, int32 [], and the cache with the prompt.

    x: embeddings [1, L, D], of which the first `count` are real. What padding leaves in the cache
    is overwritten before anything sees it.
    """
    model = _model(config, params)
    hidden, longer = model.extend(x, cache)
    last = jax.lax.dynamic_index_in_dim(hidden, count - 1, axis=1, keepdims=False)
    return likeliest(model.logits(last)[0]), replace(longer, length=cache.length + count)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _follow(
    config: LanguageModelConfig, params: Tree, token: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """The token after a token, and the cache with that."""
    model = _model(config, params)
    hidden, longer = model.extend(model.embed(token[None, None]), cache)
    return likeliest(model.logits(hidden[:, -1])[0]), longer
