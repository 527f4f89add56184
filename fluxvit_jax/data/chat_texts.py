"""The texts of a training batch for video chat: ids and labels of fixed length."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fluxvit_jax.data import captions
from fluxvit_jax.data.annotations import Record
from fluxvit_jax.data.chat_templates import (
    ASSISTANT,
    IGNORED,
    USER,
    VIDEO,
    Turn,
    encode_conversation,
)
from fluxvit_jax.data.chat_tokenizer import ChatTokenizer

QUESTION = Turn(USER, "<image>\nDescribe the video.")  # of a caption; "plain" leaves it out


@dataclass(frozen=True)
class ChatTexts:
    """Makes ids and labels of records' conversations or captions: see `captions.TextArrays`.

    folder: of the language model; template, labels: see `encode_conversation`; tokens: of a text,
    the video's place counted as one.
    """

    folder: str
    template: str
    labels: str
    tokens: int

    def __call__(
        self, records: Sequence[Record], samples: np.ndarray, seed: int
    ) -> dict[str, np.ndarray]:
        """text, labels: int32 [B, tokens], padded on the right; place: int32 [B], the video's.

        A text that is too long is cut. The id at `place` is that of padding.
        """
        shape = len(records), self.tokens
        text = np.full(shape, self._tokenizer.padding, np.int32)
        labels = np.full(shape, IGNORED, np.int32)
        place = np.zeros(len(records), np.int32)
        for row, (record, sample) in enumerate(zip(records, samples, strict=True)):
            turns = getattr(record, "conversation", ()) or (
                QUESTION,
                Turn(ASSISTANT, captions.drawn(record, seed, int(sample))),
            )
            ids, own = encode_conversation(turns, self._tokenizer, self.template, self.labels)
            if len(ids) > self.tokens:
                logging.warning(
                    "%s: its text of %d tokens is cut to %d (config.chat.text_tokens)",
                    record.id, len(ids), self.tokens,
                )  # fmt: skip
                ids, own = ids[: self.tokens], own[: self.tokens]
            text[row, : len(ids)], labels[row, : len(own)] = ids, own
            place[row] = np.flatnonzero(ids == VIDEO)[0]
            text[row, place[row]] = self._tokenizer.padding
        return {"text": text, "labels": labels, "place": place}

    @cached_property
    def _tokenizer(self) -> ChatTokenizer:
        return ChatTokenizer(self.folder)
