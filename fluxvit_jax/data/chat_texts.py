"""The texts of a training batch for video chat: ids and labels of fixed length."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fluxvit_jax.data.captions import ClipTimes
from fluxvit_jax.data.chat_templates import IGNORED, VIDEO, encode_conversation, time_message
from fluxvit_jax.data.chat_tokenizer import ChatTokenizer
from fluxvit_jax.data.sources import Record, Source
from fluxvit_jax.errors import UserError

CHECKED = 64  # conversations that are looked at before a run
# Of the text of a frame's time, at most: letters of the longest one, "99999.9s". A tokenizer makes
# no more tokens than there are bytes.
TIME_TOKENS = 8
NO_TOKEN = -1


@dataclass(frozen=True)
class ChatTexts:
    """Makes ids and labels of records' conversations: see `captions.TextArrays`.

    folder: of the language model; template, labels: see `encode_conversation`; tokens: of a text,
    the video's place counted as one; time_message: whether a conversation tells how long its video
    is; frames: most frames of a clip whose times are told, 0 for none.
    """

    folder: str
    template: str
    labels: str
    tokens: int
    time_message: bool = False
    frames: int = 0

    def __call__(
        self,
        records: Sequence[Record],
        samples: np.ndarray,
        seed: int,
        times: Sequence[ClipTimes],
    ) -> dict[str, np.ndarray]:
        """text, labels: int32 [B, tokens], padded on the right; place: int32 [B], the video's.

        A text that is too long is cut. The id at `place` is that of padding. Nothing of records
        without conversations. Where times of frames are told also times: int32 [B, frames,
        TIME_TOKENS], see `time_ids`.
        """
        if not records[0].conversation:
            return {}
        shape = len(records), self.tokens
        text = np.full(shape, self._tokenizer.padding, np.int32)
        labels = np.full(shape, IGNORED, np.int32)
        place = np.zeros(len(records), np.int32)
        for row, record in enumerate(records):
            ids, own = encode_conversation(
                record.conversation,
                self._tokenizer,
                self.template,
                self.labels,
                self._message(times[row]),
            )
            if len(ids) > self.tokens:
                ids, own = self._cut(record, ids, own)
            place[row] = np.argmax(ids == VIDEO)
            text[row, : len(ids)], labels[row, : len(own)] = ids, own
            text[row, place[row]] = self._tokenizer.padding
        arrays = {"text": text, "labels": labels, "place": place}
        if self.frames:
            arrays["times"] = np.stack(
                [time_ids(clip.frames, self._tokenizer, self.frames) for clip in times]
            )
        return arrays

    def _message(self, clip: ClipTimes) -> str:
        if not self.time_message or not clip.seconds:
            return ""
        return time_message(clip.seconds, len(clip.frames), training=True)

    def check(self, source: Source) -> None:
        """Raises UserError if texts are cut before their answers, in all of the first records."""
        some = range(min(CHECKED, len(source)))
        times = [ClipTimes(10.0, np.arange(10.0))]
        labels = (self([source[n]], np.array([n]), 0, times)["labels"] for n in some)
        if all((own == IGNORED).all() for own in labels):
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


def time_ids(seconds: np.ndarray, tokenizer: ChatTokenizer, frames: int) -> np.ndarray:
    """The ids of a text for each frame of a clip, such as "2.5s": int32 [frames, TIME_TOKENS].

    `NO_TOKEN` fills up. There is no text where no frame is later than the first: the video does not
    say how fast it is, or it is an image.

    seconds: [T], of up to `frames` frames.
    """
    ids = np.full((frames, TIME_TOKENS), NO_TOKEN, np.int32)
    if np.max(seconds, initial=0.0) > 0:
        for row, second in enumerate(seconds):
            own = tokenizer.encode(f"{min(second, 99999.9):.1f}s")
            ids[row, : len(own)] = own
    return ids
