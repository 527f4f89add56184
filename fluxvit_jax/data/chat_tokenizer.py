"""The tokenizer of a language model, from its Hugging Face folder (extra `chat`)."""

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"
IM_START, IM_END, PADDING = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
THINK = "<think>"
# Where a model says which tokens end an answer; the first file that does so counts.
CONFIGS = ("generation_config.json", "config.json")
UNFINISHED = "\ufffd"  # what bytes that are no whole character are decoded as


class ChatTokenizer:
    """A tokenizer of the Qwen family. It can be pickled, so that workers can be sent one.

    Attributes:
      size: number of tokens, special ones included. A model may have more rows of embeddings.
      im_start, im_end: the ids around a turn of a conversation.
      padding: the id that fills a batch up.
      end_tokens: the ids that end an answer: those of the model's configs, then `im_end`.
      no_thoughts: what an answer begins with so that a model that thinks (Qwen3) does not.

    Args:
      folder: folder with `tokenizer.json` and, if the model has them, `generation_config.json` and
        `config.json`; it may be in a bucket.

    Raises:
      UserError: the package `tokenizers` is missing; there is no tokenizer.json, or a damaged one,
        or it lacks a token of the chat template; a config is damaged.
    """

    def __init__(self, folder: storage.PathLike):
        self.name = storage.display_name(os.path.join(os.fspath(folder), FILE))
        self._tokenizer = _read(folder, self.name)
        self.size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.im_start = self.id_of(IM_START)
        self.im_end = self.id_of(IM_END)
        self.padding = self.id_of(PADDING)
        thinks = self._tokenizer.token_to_id(THINK) is not None
        self.no_thoughts = f"{THINK}\n\n</think>\n\n" if thinks else ""
        self.end_tokens = tuple(dict.fromkeys([*_end_tokens(folder), self.im_end]))

    def encode(self, text: str) -> list[int]:
        """The ids of a text, in which special tokens are recognized by their names; none is added.

        Half a surrogate pair, which JSON can write, becomes "?".
        """
        whole = text.encode(errors="replace").decode()
        return self._tokenizer.encode(whole, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids; those that stand for no token are left out.

        skip_special: whether special tokens are left out as well.
        """
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids piece by piece, as soon as characters are complete.

        The pieces put together are `decode(ids)`. A character may be spread over several tokens.
        """
        pending: list[int] = []
        for number in ids:
            pending.append(int(number))
            text = self.decode(pending)
            if not text.endswith(UNFINISHED):
                pending = []
                if text:
                    yield text
        if text := self.decode(pending):
            yield text

    def id_of(self, token: str) -> int:
        """The id of a token by its name. Raises UserError if there is no such token."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise UserError(f"{self.name}: lacks the token {token}; is this a chat model of Qwen?")
        return found


def _read(folder: storage.PathLike, name: str) -> "Tokenizer":
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError(
            "video chat needs the package tokenizers: pip install 'fluxvit_jax[chat]'"
        ) from error
    content = _content(folder, FILE)
    if content is None:
        raise UserError(f"{name}: no such file; name the folder of a model from Hugging Face")
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # of this very class
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: is damaged, or no tokenizer: {reason}") from error
    # A file may ask for both, which are for batches.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _end_tokens(folder: storage.PathLike) -> list[int]:
    """`eos_token_id`, one or several, of the first config that has it; [] if none does."""
    for file in CONFIGS:
        content = _content(folder, file)
        if content is None:
            continue
        name = storage.display_name(os.path.join(os.fspath(folder), file))
        try:
            config: Any = storage.parse_json(content)
        except ValueError as error:
            raise UserError(f"{name}: no JSON: {error}") from error
        found = config.get("eos_token_id") if isinstance(config, dict) else None
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(number) is int and number >= 0 for number in ids):
            raise UserError(f"{name}: eos_token_id={found} is no token, nor a list of tokens")
        return ids
    return []


def _content(folder: storage.PathLike, file: str) -> bytes | None:
    """The content of a file of a folder; None if there is no such file."""
    path = os.path.join(os.fspath(folder), file)
    try:
        return storage.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        name = storage.display_name(path)
        raise UserError(f"{name}: cannot be read: {error.strerror}") from error
