"""CLIP's tokenizer: texts to ids, by the packages `ftfy` and `tokenizers` (extra `clip`).

The vocabulary is OpenAI CLIP's (`vocabulary/`, MIT). The ids are those of open_clip's tokenizer,
which the official code uses, whatever `max_txt_l` its configs say: that has no effect there.
"""

import functools
import gzip
import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fluxvit_jax.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = Path(__file__).parent / "vocabulary/bpe_simple_vocab_16e6.txt.gz"
MERGES = slice(1, 48895)  # lines of the file; those after are not used
START, END, PADDING = 49406, 49407, 0
CONTEXT = 77  # tokens of a text, with START and END
SPECIAL = ("<start_of_text>", "<end_of_text>")
# English contractions, runs of letters, single digits, runs of anything else but space.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
END_OF_WORD = "</w>"


def tokenize(texts: Sequence[str], context: int = CONTEXT) -> np.ndarray:
    """Ids of texts: int32 [len(texts), context], START first, END last, then PADDING.

    A text of more tokens is cut; `token_count` tells. Raises UserError without the packages.
    """
    ids = np.full((len(texts), context), PADDING, np.int32)
    for row, text in zip(ids, texts, strict=True):
        found = [START, *_encode(text), END][:context]
        row[: len(found)] = found
        if len(found) == context:
            row[-1] = END
    return ids


def token_count(text: str) -> int:
    """Tokens of a text that is not cut, with START and END."""
    return len(_encode(text)) + 2


def _encode(text: str) -> list[int]:
    return _tokenizer().encode(_clean(text), add_special_tokens=False).ids


def _clean(text: str) -> str:
    """Mended Unicode, no HTML entities, single spaces, lower case."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@functools.cache
def _tokenizer() -> "Tokenizer":
    try:
        import ftfy  # noqa: F401
        from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    except ImportError as error:
        raise UserError(
            f"texts need the package {error.name}: pip install 'fluxvit_jax[clip]'"
        ) from error
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")[MERGES]
    merges = [(first, second) for first, second in map(str.split, lines)]
    letters = _byte_letters()
    pieces = [*letters, *(letter + END_OF_WORD for letter in letters), *map("".join, merges)]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *SPECIAL])}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix=END_OF_WORD)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    return tokenizer


def _byte_letters() -> list[str]:
    """The letters that stand for bytes, in the order of their ids.

    Printable characters of Latin-1 for themselves, then letters from U+0100 on for other bytes.
    """
    printable = [chr(byte) for byte in range(256) if 33 <= byte <= 126 or 161 <= byte != 173]
    return printable + [chr(256 + number) for number in range(256 - len(printable))]
