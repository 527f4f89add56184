"""Captions: cleaned as in the official code, tokenized, drawn, and whose they are.

Source of the cleaning, in training and evaluation: InternVideo2, multi_modality, dataset/utils.py
(pre_text).
"""

import hashlib
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np

from fluxvit_jax.data.random_streams import CAPTION_STREAM, stream_rng
from fluxvit_jax.data.tokenizer import CONTEXT, token_count, tokenize

if TYPE_CHECKING:  # a server that loads an exported folder does without
    from fluxvit_jax.data.sources import Record

SHOWN = 60  # letters of a text in a warning

_DELETED = re.compile(r"[,.'!?\"()*#:;~]")
_JOINTS = str.maketrans("-/", "  ")


class ClipTimes(NamedTuple):
    """seconds: length of a video, or of the part of it that a clip is of, 0 where it is not known.

    frames: float [T], the seconds at which the frames of the clip are shown, from its beginning.
    """

    seconds: float
    frames: np.ndarray


@runtime_checkable
class TextArrays(Protocol):
    """Makes arrays, [B, ...], of the texts of B samples; pickles, for worker processes."""

    def __call__(
        self,
        records: Sequence["Record"],
        samples: np.ndarray,
        seed: int,
        times: Sequence[ClipTimes],
    ) -> dict[str, np.ndarray]:
        """samples: int64 [B], the number of each, by which a text is drawn."""


def clip_texts(
    records: Sequence["Record"],
    samples: np.ndarray,
    seed: int,
    times: Sequence[ClipTimes] = (),
) -> dict[str, np.ndarray]:
    """What contrastive learning needs of captioned records.

    text: int32 [B, 77], ids of one of the video's captions, as `tokenizer.tokenize`; identity:
    int32 [B, 2], see `identity`. Nothing of records without captions.
    """
    if not records[0].captions:
        return {}
    pairs = zip(records, samples, strict=True)
    return {
        "text": tokenize([drawn(record, seed, int(sample)) for record, sample in pairs]),
        "identity": np.stack([identity(record) for record in records]),
    }


def clean(caption: str) -> str:
    """Lower case, without punctuation, with single spaces.

    A single tab or line break inside stays, as do curly quotes and other symbols.
    """
    text = _DELETED.sub("", caption.lower()).translate(_JOINTS).replace("<person>", "person")
    return re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")


def tokenize_cleaned(texts: Sequence[str]) -> np.ndarray:
    """Ids of texts, which are cleaned: int32 [T, 77]. Warns of those that are cut."""
    cleaned = [clean(text) for text in texts]
    if long := [text for text in cleaned if token_count(text) > CONTEXT]:
        warnings.warn(
            f"{len(long)} of {len(cleaned)} texts are longer than {CONTEXT} tokens and are cut; "
            f"the first: {long[0][:SHOWN]!r}",
            stacklevel=3,
        )
    return tokenize(cleaned)


def drawn(record: "Record", seed: int, sample: int) -> str:
    """One of a record's captions, by the seed and the number of the sample."""
    rng = stream_rng(seed, sample, CAPTION_STREAM)
    return record.captions[rng.integers(len(record.captions))]


def identity(record: "Record") -> np.ndarray:
    """Numbers that records of one file, or of one segment of it, share, and no others: int32 [2].

    A record's id names its list and its file. The official code takes the index in a list, or the
    file's name, which other sources share.
    """
    key = f"{record.id} {record.segment}"
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
    return np.frombuffer(digest[:8], np.int32).copy()
