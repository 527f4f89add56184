"""Lists of videos and images with captions, to train on.

A list is JSON as the official code reads it, [{"video" or "image": path, "caption": text or texts,
"video_start_frame": .., "video_end_frame": ..}], or CSV with the columns path,caption. Paths are
relative to a root. A video in several lines, or with several captions, is one thing: see
`data.captions`.
"""

import csv
import dataclasses
import io
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from etils import epath

from fluxvit_jax.data import captions
from fluxvit_jax.data.annotations import is_list, open_source, path_inside
from fluxvit_jax.data.list_rows import text_of
from fluxvit_jax.data.prepared_source import PreparedSource
from fluxvit_jax.data.sources import Example, FileSource, Segment, digest
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError

PATHS = ("video", "image")
BOUNDS = ("video_start_frame", "video_end_frame")


@dataclasses.dataclass(frozen=True)
class CaptionSource(FileSource):
    """The videos of a list with cleaned captions, whose identity covers these and the segments."""

    @cached_property
    def identity(self) -> dict[str, int | str]:
        rows = (f"{example.captions} {example.segment}" for example in self.examples)
        return {"videos": len(self), "ids": digest(self.ids), "captions": digest(rows)}

    @cached_property
    def fingerprint(self) -> str:
        return with_captions(super().fingerprint, str(self.identity["captions"]))


def with_captions(fingerprint: str, captions: str) -> str:
    """The fingerprint of captioned videos; captions: of their identity, "" for none."""
    return digest([fingerprint, captions]) if captions else fingerprint


def open_captioned(
    path: storage.PathLike, root: storage.PathLike | None = None
) -> CaptionSource | PreparedSource:
    """A list as `open_captions` reads it, or a folder written by `prepare --captions`.

    Raises UserError: as `open_captions` and `annotations.open_source`; a folder without captions.
    """
    if is_list(path):
        return open_captions(path, root)
    source = open_source(path)
    if not isinstance(source, PreparedSource) or "captions" not in source.identity:
        raise UserError(f"{path}: is a folder without captions; name a list, JSON or CSV, of them")
    return source


def open_captions(path: storage.PathLike, root: storage.PathLike | None = None) -> CaptionSource:
    """The videos of a list with their captions, cleaned.

    root: folder that the paths are relative to; by default that of the list.

    Raises UserError: no such list, or none of this form; an entry without a path or a caption; a
    path outside the root; a part of a video that is empty.
    """
    location = storage.path_of(path)
    base = storage.path_of(root) if root else location.parent
    if not storage.is_folder(base):
        raise UserError(f"{path}: the root of its paths, {base}, is no folder")
    absolute = os.fspath(base) if storage.is_remote(base) else os.path.abspath(base)
    examples = [_example(where, entry, absolute) for where, entry in entries(location)]
    if not examples:
        raise UserError(f"{path}: holds no captions; write one a line: path,caption")
    return CaptionSource(examples)


def entries(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of a list, each with where it stands, for messages.

    Raises UserError: it cannot be read, or is not of this form.
    """
    text = text_of(path)
    if path.suffix == ".csv":
        yield from _csv_entries(path, text)
        return
    try:
        found = storage.parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}: no JSON: {error}") from error
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise UserError(f'{path}: not a list of {{"video": .., "caption": ..}}')
    for number, entry in enumerate(found):
        yield f"{path}: entry {number}", entry


def _csv_entries(path: epath.Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = csv.DictReader(io.StringIO(text), skipinitialspace=True, strict=True)
    begin = 1  # line of a row; it may have more, in quotes
    try:
        if {"path", "caption"} - set(rows.fieldnames or ()):
            raise UserError(f"{path}: the first line is not path,caption")
        begin = rows.line_num + 1
        for row in rows:
            if None in row:  # columns without a name
                raise UserError(
                    f"{path}: line {begin}: has more columns than the first line; put a caption "
                    'with a comma in quotes: path,"caption"'
                )
            yield f"{path}: line {rows.line_num}", {"video": row["path"], "caption": row["caption"]}
            begin = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: line {begin}: is not valid CSV: {error}") from None


def strings(value: Any, what: str) -> Sequence[str]:
    """A text as a list of one. Raises UserError for anything but texts."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values or not all(isinstance(x, str) for x in values):
        raise UserError(f"{what} is no text and no list of texts")
    return values


def cleaned(texts: Sequence[str], where: str) -> tuple[str, ...]:
    """Captions without punctuation. Raises UserError if one is nothing else.

    Half a surrogate pair, which JSON can write, is dropped.
    """
    found = tuple(captions.clean(text.encode(errors="replace").decode()) for text in texts)
    if not all(found):
        raise UserError(f"{where}: a caption is empty, or has nothing but punctuation")
    return found


def _example(where: str, entry: dict[str, Any], root: str) -> Example:
    path = next((entry[name] for name in PATHS if name in entry), None)
    if not isinstance(path, str):
        raise UserError(f'{where}: names no file: "video" or "image" is missing')
    name = path_inside(where, path, root)
    # Some lists have several captions under "captions".
    texts = strings(entry.get("caption", entry.get("captions")), f"{where}: caption")
    return Example(
        storage.display_name(name),
        0,
        os.path.join(root, name),
        cleaned(texts, where),
        _segment(where, entry),
    )


def _segment(where: str, entry: dict[str, Any]) -> Segment | None:
    """The first frame of a clip within a video, and the frame after its last."""
    if not any(name in entry for name in BOUNDS):
        return None
    first, end = (entry.get(name) for name in BOUNDS)
    if not isinstance(first, int) or not isinstance(end, int) or not 0 <= first < end:
        raise UserError(
            f"{where}: {BOUNDS[0]}={first} and {BOUNDS[1]}={end} are no part of a video: two frame "
            "numbers that rise"
        )
    return first, end
