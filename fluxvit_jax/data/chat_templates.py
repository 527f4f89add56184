"""Conversations about a video as the ids and labels that a language model is trained on.

Two templates: "plain", of the first stage of VideoChat-Flash, is the video and the answer, whatever
the question; "qwen", of its later stages and of inference, is ChatML with a system message. Source:
VideoChat-Flash, llava/train/train.py (preprocess_multimodal, preprocess_plain, preprocess_qwen).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fluxvit_jax.errors import UserError

if TYPE_CHECKING:  # those who only read lists do without
    from fluxvit_jax.data.chat_tokenizer import ChatTokenizer

IGNORED = -100  # label of a token that the loss does not count
VIDEO = -200  # id in whose place the visual tokens go
TEMPLATES = ("plain", "qwen")
LABELS = ("answers", "official")

USER, ASSISTANT = "user", "assistant"
ROLES = {"human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT}
MARKER = "<image>"  # where the video goes; data sets also write:
OTHER_MARKER = "<video>"
OUTER_MARKERS = re.compile(rf"^\s*({MARKER}|{OTHER_MARKER})\s*|\s*({MARKER}|{OTHER_MARKER})\s*$")
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
NO_VIDEO = f"the conversation has no {MARKER}, where the video goes"
# Left over in VideoInstruct-100k, from which the official code deletes it.
NOISE = "QA_GT_caption_based_noisy"


class Turn(NamedTuple):
    """One message of a conversation. role: "user" or "assistant"."""

    role: str
    text: str


def read_turns(turns: Iterable[Mapping[str, Any] | Turn]) -> tuple[Turn, ...]:
    """The turns of a conversation as data sets write them.

    turns: {"from": "human" or "gpt", "value": text}, or {"role": "user" or "assistant", "content":
      text}; `Turn`s stay as they are.

    Raises UserError: a turn is of neither form, or its role is unknown.
    """
    return tuple(
        turn if isinstance(turn, Turn) else _read_turn(f"turn {number} of the conversation", turn)
        for number, turn in enumerate(turns, 1)
    )


def check_conversation(turns: Sequence[Turn], template: str) -> None:
    """Raises UserError for a conversation that a template cannot take, or without an answer.

    A conversation in the template "qwen" may be without a video.
    """
    _check_name("template", template, TEMPLATES)
    if template == "plain" and len(turns) != 2:
        raise UserError(f"the conversation has {len(turns)} turns, the plain template takes 2")
    if template == "plain" and [turn.role for turn in turns] != [USER, ASSISTANT]:
        raise UserError("the plain template takes a question of the user, then an answer")
    turns = _prepared(turns)
    if not any(turn.role == ASSISTANT for turn in turns):
        raise UserError("the conversation has no answer to learn: all labels would be ignored")
    if any(turn.role == ASSISTANT and MARKER in turn.text for turn in turns):
        raise UserError(f"an answer of the conversation has {MARKER}, which belongs in a question")
    markers = sum(turn.text.count(MARKER) for turn in turns)
    if template == "plain" and not markers:
        raise UserError(NO_VIDEO)
    if markers > 1:
        raise UserError(f"the conversation has {markers} {MARKER}; it can be about one video")


def has_video(turns: Sequence[Turn]) -> bool:
    """Whether a conversation says where its video goes."""
    return any(MARKER in turn.text for turn in _prepared(turns))


def encode_conversation(
    turns: Iterable[Mapping[str, Any] | Turn],
    tokenizer: "ChatTokenizer",
    template: str,
    labels: str = "answers",
    time_message: str = "",
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a conversation and the labels of its tokens: int32 [L] each.

    One id is `VIDEO`, unless the conversation has no video. Labels are ids or `IGNORED`; they are
    not shifted.

    Args:
      turns: as `read_turns` takes them. `<image>`, or else `<video>`, in a question says that there
        is a video; it is moved to the beginning of the question. A first turn by the assistant is
        dropped.
      tokenizer: that of the language model.
      template: "plain" or "qwen".
      labels: "answers", the content of answers and the token that ends them; or "official", which
        in the template "qwen" are also the header of answers and, in every turn, all newlines and
        tokens around turns.
      time_message: see `time_message`, with `training`.

    Raises:
      UserError: as `read_turns` and `check_conversation`.
      ValueError: no such template or kind of labels.
    """
    _check_name("labels", labels, LABELS)
    read = read_turns(turns)
    check_conversation(read, template)
    if template == "plain":
        ids, own = _encode_plain(read, tokenizer)
    else:
        cleaned = [Turn(t.role, _with_marker_first(t.text, time_message)) for t in _prepared(read)]
        ids, own = _encode_qwen(cleaned, tokenizer, official=labels == "official")
    return np.array(ids, np.int32), np.array(own, np.int32)


def time_message(seconds: float, frames: int, training: bool) -> str:
    """What a question begins with to tell how long the video is; see `encode_conversation`.

    training: whether for `encode_conversation`, where it goes right behind the marker, rather than
      for `prompt_ids`. In the official prompts a line break follows it only in training.
    """
    text = (
        f"The video lasts for {seconds:.2f} seconds, and {frames} frames are uniformly sampled "
        "from it. "
    )
    return f"\n{text}" if training else text


def prompt_ids(
    history: Sequence[tuple[str, str]],
    question: str,
    tokenizer: "ChatTokenizer",
    time_message: str = "",
) -> np.ndarray:
    """The ids after which a model writes its answer to a question about a video: int32 [L].

    One id is `VIDEO`, at the beginning of the first question. The template is "qwen". A marker at
    either end of a question is left out.

    Args:
      history: earlier questions and their answers.
      question: the next question.
      tokenizer: that of the language model.
      time_message: see `time_message`, without `training`.
    """
    question_1, *questions = [*(asked for asked, _ in history), question]
    opening = f"\n{time_message}{_unmarked(question_1)}<|im_end|>\n{_header(ASSISTANT)}"
    ids = [*tokenizer.encode(SYSTEM + _header(USER)), VIDEO, *tokenizer.encode(opening)]
    for (_, answer), asked in zip(history, questions, strict=True):
        ids += [*tokenizer.encode(answer), *follow_up_ids(asked, tokenizer)]
    return np.array(ids, np.int32)


def follow_up_ids(question: str, tokenizer: "ChatTokenizer") -> np.ndarray:
    """The ids that a further question adds after the last token of an answer: int32 [L].

    They begin with the token that ends the answer, which a model that wrote it has not read yet.
    """
    text = f"<|im_end|>\n{_header(USER)}{_unmarked(question)}<|im_end|>\n{_header(ASSISTANT)}"
    return np.array(tokenizer.encode(text), np.int32)


def _check_name(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"{what}: {name!r} is none of {', '.join(known)}")


def _read_turn(where: str, turn: Any) -> Turn:
    keys = turn.keys() if isinstance(turn, Mapping) else set()
    by, content = ("from", "value") if "from" in keys else ("role", "content")
    if not {by, content} <= keys or not isinstance(turn[content], str):
        raise UserError(
            f'{where} is not {{"from": .., "value": text}}, nor {{"role": .., "content": text}}'
        )
    role = turn[by]
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{where} is by {role!r}, who is none of {', '.join(ROLES)}")
    return Turn(ROLES[role], turn[content])


def _prepared(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The turns without a first one by the assistant, with `MARKER` where the video goes."""
    turns = turns[1:] if turns and turns[0].role == ASSISTANT else turns
    if any(MARKER in turn.text for turn in turns):
        return turns  # then the other marker is a word as any other
    return [
        Turn(role, text.replace(OTHER_MARKER, MARKER) if role == USER else text)
        for role, text in turns
    ]


def _header(role: str) -> str:
    return f"<|im_start|>{role}\n"


def _unmarked(question: str) -> str:
    """A question without markers at its ends."""
    return OUTER_MARKERS.sub("", question)


def _with_marker_first(text: str, time_message: str) -> str:
    """A message with its marker, if any, at its beginning, and the time message after it."""
    if MARKER in text and not text.startswith(MARKER):
        text = f"{MARKER}\n{text.replace(MARKER, '').strip()}".strip()
    if time_message.strip():
        text = text.replace(MARKER, f"{MARKER}{time_message.rstrip()} ")
    return text.replace(NOISE, "")


def _encode(text: str, tokenizer: "ChatTokenizer") -> list[int]:
    """The ids of a text, with `VIDEO` for a marker."""
    first, *others = map(tokenizer.encode, text.split(MARKER))
    for other in others:
        first += [VIDEO, *other]
    return first


def _encode_plain(turns: Sequence[Turn], tokenizer: "ChatTokenizer") -> tuple[list[int], list[int]]:
    """The video, the answer and a newline; all but the video is labeled."""
    answer = tokenizer.encode(turns[1].text.replace(NOISE, "") + "\n")
    return [VIDEO, *answer], [IGNORED, *answer]


def _encode_qwen(
    turns: Sequence[Turn], tokenizer: "ChatTokenizer", official: bool
) -> tuple[list[int], list[int]]:
    ids = tokenizer.encode(SYSTEM)
    labels = [IGNORED] * len(ids)
    newline = tokenizer.encode("\n")
    for role, text in turns:
        own = _encode(f"{_header(role)}{text}<|im_end|>\n", tokenizer)
        first, end = 0, len(own)
        if not official:
            first, end = _common(own, tokenizer.encode(_header(role))), end - len(newline)
        if role == USER:
            first = end
        ids += own
        labels += [IGNORED] * first + own[first:end] + [IGNORED] * (len(own) - end)
    if official:
        marks = {*newline, tokenizer.im_start, tokenizer.im_end}
        labels = [i if i in marks else label for i, label in zip(ids, labels, strict=True)]
    return ids, labels


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning: a newline at the start of a text joins that of its header."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))
