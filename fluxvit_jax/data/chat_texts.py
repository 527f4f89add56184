"""The texts of a training batch for video chat: ids and labels of fixed length."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fluxvit_jax.data.annotations import Record
from fluxvit_jax.data.chat_templates import IGNORED, VIDEO, encode_conversation
from fluxvit_jax.data.chat_tokenizer import ChatTokenizer
from fluxvit_jax.errors import UserError


@dataclass(frozen=True)
class ChatTexts:
    """Makes ids and labels of records' conversations: see `captions.TextArrays`.

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
        for row, record in enumerate(records):
            ids, own = encode_conversation(
                record.conversation, self._tokenizer, self.template, self.labels
            )
            if len(ids) > self.tokens:
                logging.warning(
                    "%s: its text of %d tokens is cut to %d (config.chat.text_tokens)",
                    record.id, len(ids), self.tokens,
                )  # fmt: skip
                ids, own = ids[: self.tokens], own[: self.tokens]
                if (own == IGNORED).all():
                    raise UserError(
                        f"config.chat.text_tokens: {self.tokens} tokens of {record.id} end before "
                        "its first answer; set more"
                    )
            text[row, : len(ids)], labels[row, : len(own)] = ids, own
            if VIDEO not in ids:
                raise UserError(
                    f"config.chat.text_tokens: {self.tokens} tokens of {record.id} end before its "
                    "video; set more"
                )
            place[row] = np.argmax(ids == VIDEO)
            text[row, place[row]] = self._tokenizer.padding
        return {"text": text, "labels": labels, "place": place}

    @cached_property
    def _tokenizer(self) -> ChatTokenizer:
        return ChatTokenizer(self.folder)
