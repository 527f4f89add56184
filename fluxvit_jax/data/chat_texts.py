"""The texts of a training batch for video chat: ids and labels of fixed length."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fluxvit_jax.data.annotations import Record, Source
from fluxvit_jax.data.chat_templates import IGNORED, VIDEO, encode_conversation
from fluxvit_jax.data.chat_tokenizer import ChatTokenizer
from fluxvit_jax.errors import UserError

CHECKED = 64  # conversations that are looked at before a run


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

        A text that is too long is cut. The id at `place` is that of padding. Nothing of records
        without conversations.
        """
        if not records[0].conversation:
            return {}
        shape = len(records), self.tokens
        text = np.full(shape, self._tokenizer.padding, np.int32)
        labels = np.full(shape, IGNORED, np.int32)
        place = np.zeros(len(records), np.int32)
        for row, record in enumerate(records):
            ids, own = encode_conversation(
                record.conversation, self._tokenizer, self.template, self.labels
            )
            if len(ids) > self.tokens:
                ids, own = self._cut(record, ids, own)
            place[row] = np.argmax(ids == VIDEO)
            text[row, : len(ids)], labels[row, : len(own)] = ids, own
            text[row, place[row]] = self._tokenizer.padding
        return {"text": text, "labels": labels, "place": place}

    def check(self, source: Source) -> None:
        """Raises UserError if texts are cut before their answers, in all of the first records."""
        some = range(min(CHECKED, len(source)))
        if all((self([source[n]], np.array([n]), 0)["labels"] == IGNORED).all() for n in some):
            raise UserError(
                f"config.chat.text_tokens: of {self.tokens} tokens, no answer is left of the first "
                f"{len(some)} conversations; set more"
            )

    def _cut(
        self, record: Record, ids: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The first tokens of a text; nothing is learned from one that ends before its video."""
        kept, own = ids[: self.tokens], labels[: self.tokens]
        if VIDEO not in kept:
            own = np.full_like(own, IGNORED)
        logging.warning(
            "%s: its text of %d tokens is cut to %d (config.chat.text_tokens), which leaves %d of "
            "%d labels", record.id, len(ids), self.tokens,
            (own != IGNORED).sum(), (labels != IGNORED).sum(),
        )  # fmt: skip
        return kept, own

    @cached_property
    def _tokenizer(self) -> ChatTokenizer:
        return ChatTokenizer(self.folder)
