"""Lists of conversations about videos and images, to train a video chat model on.

A list is JSON or JSON Lines of items:

    {"video" or "image": path, "conversations": [{"from": "human", "value": "<image>\\n.."},
     {"from": "gpt", "value": ".."}], "start": seconds, "end": seconds}

with start and end for a part of a video. In place of "conversations" there may be a "caption", text
or a list of texts, each of which is the answer to `QUESTION`; a CSV list is of path,caption. Paths
are relative to a root. Several lists are named by YAML, or by JSON of the same shape:

    datasets:
      - json_path: videos.json
        data_root: videos
        sampling_strategy: first:10%

json_path is relative to the folder of that file; sampling_strategy is all, or first, end or random
with a number of items or a percentage. Source: VideoChat-Flash, llava/train/train.py
(LazySupervisedDataset), which refuses random.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from etils import epath

from fluxvit_jax.data.annotations import path_inside
from fluxvit_jax.data.caption_lists import entries
from fluxvit_jax.data.chat_templates import (
    ASSISTANT,
    NO_VIDEO,
    USER,
    Turn,
    check_conversation,
    has_video,
    read_turns,
)
from fluxvit_jax.data.list_rows import text_of
from fluxvit_jax.data.mixture import Mixture, Part, mixed
from fluxvit_jax.data.sources import Example, FileSource, Seconds, Source, Subset, digest, shuffled
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError

MEDIA = ("video", "image")
QUESTION = Turn(USER, "<image>\nDescribe the video.")  # that a caption answers
# Of a list among several. Of the last two the official code makes use where we need none.
FIELDS = ("json_path", "data_root", "sampling_strategy", "media_type", "video_read_type")
FOLDERS_OF_FRAMES = ("img", "frame")
STRATEGY = re.compile(r"(first|end|random):([0-9]+)(%?)")


@dataclasses.dataclass(frozen=True)
class ConversationSource(FileSource):
    """The videos of a list, one for each conversation; its identity covers what is said."""

    @cached_property
    def identity(self) -> dict[str, int | str]:
        rows = (f"{example.conversation} {example.seconds}" for example in self.examples)
        return {"videos": len(self), "ids": digest(self.ids), "conversations": digest(rows)}

    @cached_property
    def fingerprint(self) -> str:
        return digest([super().fingerprint, str(self.identity["conversations"])])


def open_conversations(
    path: storage.PathLike, root: storage.PathLike | None = None, template: str = "qwen"
) -> Mixture:
    """The conversations of a list or of several; images become parts of their own.

    No part is mirrored, as its texts may say left and right. A record has its turns in
    `conversation`.

    Args:
      path: a list, .json or .jsonl, or a file that names several, .yaml, .yml or .json.
      root: folder that paths, or each data_root, are relative to; by default that of the list, or
        of the file that names it.
      template: one of `chat_templates.TEMPLATES`, which is to take all conversations.

    Raises UserError, with the file and the number of the item, from 0: no such file, or none of
    this form; a conversation without a video or image, or without a place for it, or that the
    template does not take; a path outside the root; an unknown field or strategy.
    """
    location = storage.path_of(path)
    content = _parsed(location)
    if isinstance(content, dict) and "datasets" in content:
        return mixed(_parts(location, content["datasets"], root, template), with_texts=True)
    source = _source(location, content, root, template)
    part = Part(name=storage.display_name(path), source=source, flip=False)
    return mixed([part], with_texts=True)


def _source(
    path: epath.Path, content: Any, root: storage.PathLike | None, template: str
) -> ConversationSource:
    """The conversations of a list, whose content is parsed."""
    base = storage.path_of(root) if root else path.parent
    if not storage.is_folder(base):
        raise UserError(f"{path}: the root of its paths, {base}, is no folder")
    if not isinstance(content, list):
        raise UserError(f'{path}: not a list of {{"video": .., "conversations": ..}}')
    if not content:
        raise UserError(f"{path}: holds no conversations")
    absolute = os.fspath(base) if storage.is_remote(base) else os.path.abspath(base)
    return ConversationSource(
        [
            example
            for number, item in enumerate(content)
            for example in _examples(f"{path}: item {number}", item, absolute, template)
        ]
    )


def _parsed(path: epath.Path) -> Any:
    """What a file holds as JSON, as JSON Lines, empty ones left out, as CSV, or as YAML."""
    if path.suffix == ".csv":
        return [entry for _, entry in entries(path)]
    text = text_of(path)
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        return [_json(f"{path}: line {n}", line) for n, line in lines if line.strip()]
    if path.suffix not in (".yaml", ".yml"):
        return _json(str(path), text)
    import yaml  # late; it comes with ml_collections

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: no YAML: {' '.join(str(error).split())}") from error


def _json(where: str, text: str) -> Any:
    try:
        return storage.parse_json(text)
    except ValueError as error:
        raise UserError(f"{where}: no JSON: {error}") from error


def _examples(where: str, item: Any, root: str, template: str) -> Iterator[Example]:
    """The conversation of an item, or one for each of its captions."""
    if not isinstance(item, dict):
        raise UserError(f'{where}: is not {{"video": .., "conversations": ..}}')
    medium, path = _file(where, item)
    name = path_inside(where, path, root)
    seconds = _seconds(where, item) if medium == "video" else None
    captioned = "conversations" not in item and "caption" in item
    for turns in _captions(where, item) if captioned else [_conversation(where, item, template)]:
        yield Example(
            storage.display_name(name),
            0,
            os.path.join(root, name),
            conversation=turns,
            seconds=seconds,
        )


def _captions(where: str, item: Mapping[str, Any]) -> list[tuple[Turn, ...]]:
    given = item["caption"]
    captions = given if isinstance(given, list) else [given]
    if not captions or not all(isinstance(one, str) and one.strip() for one in captions):
        raise UserError(f'{where}: "caption" is no text, nor a list of texts')
    return [(QUESTION, Turn(ASSISTANT, caption)) for caption in captions]


def _file(where: str, item: Mapping[str, Any]) -> tuple[str, str]:
    """The medium of an item and the path of its file."""
    named = [medium for medium in MEDIA if item.get(medium)]
    if len(named) != 1:
        what = "both a video and an image" if named else 'no file: "video" or "image" is missing'
        raise UserError(f"{where}: names {what}")
    paths = item[named[0]]
    if isinstance(paths, list) and len(paths) > 1:
        raise UserError(f"{where}: names {len(paths)} files; a conversation can be about one only")
    path = paths[0] if isinstance(paths, list) else paths
    if not isinstance(path, str):
        raise UserError(f'{where}: "{named[0]}" is no path')
    return named[0], path


def _conversation(where: str, item: Mapping[str, Any], template: str) -> tuple[Turn, ...]:
    turns = item.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise UserError(f'{where}: "conversations" is missing, or no list of turns')
    try:
        read = read_turns(turns)
        if not has_video(read):
            raise UserError(NO_VIDEO)
        check_conversation(read, template)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return read


def _seconds(where: str, item: Mapping[str, Any]) -> Seconds | None:
    """The part of a video that a conversation is about; None for the whole."""
    given: tuple[Any, Any] = item.get("start"), item.get("end")
    if given == (None, None):
        return None
    try:
        start, end = float(given[0]), float(given[1])
    except (TypeError, ValueError):
        start = end = math.nan
    if not 0 <= start < end < math.inf:
        raise UserError(
            f"{where}: start={given[0]} and end={given[1]} are no part of a video: two numbers of "
            "seconds that rise"
        )
    return start, end


def _parts(
    path: epath.Path, datasets: Any, root: storage.PathLike | None, template: str
) -> list[Part]:
    """The lists that a file names."""
    if not isinstance(datasets, list) or not datasets:
        raise UserError(f'{path}: "datasets" is no list of {{json_path: .., data_root: ..}}')
    parts = []
    for number, fields in enumerate(datasets):
        where = f"{path}: dataset {number}"
        _check_fields(where, fields)
        name = fields["json_path"]
        folder = _below(root or path.parent, fields["data_root"]) if "data_root" in fields else root
        try:
            location = storage.path_of(_below(path.parent, name))
            source = _source(location, _parsed(location), folder, template)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        sampled = _sampled(where, source, fields.get("sampling_strategy", "all"))
        parts.append(Part(name=storage.display_name(name), source=sampled, flip=False))
    return parts


def _check_fields(where: str, fields: Any) -> None:
    if not isinstance(fields, dict) or not isinstance(fields.get("json_path"), str):
        raise UserError(f"{where}: names no list: json_path is missing")
    for field, value in fields.items():
        if field not in FIELDS:
            raise UserError(f"{where}: {field!r} is none of {', '.join(FIELDS)}")
        if not isinstance(value, str):
            raise UserError(f"{where}: {field} is no text")
    if (kind := fields.get("video_read_type")) in FOLDERS_OF_FRAMES:
        raise UserError(
            f"{where}: video_read_type is {kind}, and folders of frames cannot be read; make "
            "videos of them: ffmpeg -i %05d.jpg a.mp4"
        )


def _below(folder: storage.PathLike, path: str) -> str:
    """A path relative to a folder, unless it is absolute or has a scheme of its own."""
    return path if "://" in path else os.path.join(os.fspath(folder), path)


def _sampled(where: str, source: ConversationSource, strategy: str) -> Source:
    """The items of a list that a strategy takes, in the order of the list."""
    if strategy == "all":
        return source
    match = STRATEGY.fullmatch(strategy)
    if not match or not int(match[2]):
        raise UserError(
            f"{where}: the sampling strategy {strategy!r} is none of all, first:N, end:N and "
            "random:N, with a number or percentage above 0"
        )
    kind, amount, percent = match[1], int(match[2]), match[3]
    count = math.ceil(amount * len(source) / 100) if percent else amount
    if count >= len(source):
        return source
    match kind:
        case "first":
            numbers = np.arange(count)
        case "end":
            numbers = np.arange(len(source) - count, len(source))
        case _:
            numbers = np.sort(shuffled(source).numbers[:count])
    return Subset(source, numbers)
