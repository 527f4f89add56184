"""Annotations: which videos a list, a folder of class folders or a prepared folder holds.

`open_source` turns any of the three into a `Source`, see `sources`. All may be in a bucket (gs://),
as may the videos of a local list. Bad input is a `UserError` that names the file and the line.
"""

import os
import re
from collections.abc import Iterable, Sequence

from etils import epath

from fluxvit_jax.data.class_names import KnownNames, is_dataset, normalized, of_dataset
from fluxvit_jax.data.list_rows import SEPARATOR, Row, label_texts, read_rows, text_of
from fluxvit_jax.data.prepared_source import PreparedSource, is_prepared, open_prepared, split_of
from fluxvit_jax.data.sources import Example, FileSource, Label, labels_of
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError

MAX_LABEL = 2**31 - 1  # labels are int32 on the device
VIDEO_SUFFIXES = {
    ".3g2", ".3gp", ".asf", ".avi", ".divx", ".f4v", ".flv", ".m2ts", ".m4v", ".mkv", ".mov",
    ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".qt", ".ts", ".vob", ".webm", ".wmv",
}  # fmt: skip
OWN_FILM = ".kept.mp4"  # how the films end that --mode=predict draws; no folder's video is one


def open_source(
    path: str | os.PathLike,
    root: str | os.PathLike | None = None,
    classes: int | None = None,
    labelled: bool = True,
    known: KnownNames | None = None,
    multi_label: bool = False,
) -> FileSource | PreparedSource:
    """Opens a list, a folder of class folders, or a folder written by `prepare`.

    Args:
      path: the list or folder. A prepared folder of several splits takes `FOLDER:SPLIT`.
      root: folder that the paths of a list are relative to (default: the folder of the list);
        folders ignore it.
      classes: number of classes, to check the labels against.
      labelled: whether to read labels; otherwise a list needs none, and all are 0.
      known: the order of the classes, where something else gives it; see `read_named`.
      multi_label: whether videos have several labels; see `read_named`.

    Raises:
      UserError: see `read_annotations`; a prepared folder that is damaged, lacks the split
        or a shard, or has a label out of range; a bucket that cannot be read; with
        `multi_label`, anything but a list.
    """
    folder, split = split_of(path)
    if multi_label and os.fspath(path) and not is_list(path):
        raise UserError(
            f"{path}: a folder tells one label a video; config.train.multi_label needs a list"
        )
    if is_prepared(folder):
        return open_prepared(folder, split, classes)
    return FileSource(*read_named(path, root, classes, labelled, known, multi_label))


def is_list(path: str | os.PathLike) -> bool:
    """Whether `open_source` reads a path as a list, not as a folder."""
    return not is_prepared(split_of(path)[0]) and not storage.is_folder(path)


def read_annotations(
    path: str | os.PathLike,
    root: str | os.PathLike | None = None,
    classes: int | None = None,
    labelled: bool = True,
) -> list[Example]:
    """The videos of a list or of a folder of class folders: see `read_named`."""
    return read_named(path, root, classes, labelled)[0]


def read_named(
    path: str | os.PathLike,
    root: str | os.PathLike | None = None,
    classes: int | None = None,
    labelled: bool = True,
    known: KnownNames | None = None,
    multi_label: bool = False,
) -> tuple[list[Example], tuple[str, ...] | None]:
    """Reads a list of videos or a folder of class folders; also the names of its classes, if any.

    A list has a video a line, `path,label`: UTF-8, two columns separated by a tab, comma, semicolon
    (with CSV quoting) or blanks, whichever most lines have before the label; the first line may
    name the columns. Labels are numbers, or, not after blanks, names: then the label is the index
    of the sorted names, as it is of class folders.

    With `multi_label`, a label is any number of these between "|", none for no class; the examples
    of a list then have tuples.

    Args:
      path: the list or folder.
      root: folder that the paths of a list are relative to (default: the folder of the list).
      classes: number of classes; labels must be below it, and there must be just as many names.
      labelled: False to read the paths only: other columns are optional and ignored.
      known: the order of the classes. Names are then looked up in it, and some may be missing; a
        folder with others keeps its own order.
      multi_label: whether the videos of a list have several labels.

    Raises:
      UserError: the list, folder or root is missing or empty; with the line number, a wrong number
        of columns, a label that is out of range or neither number nor known name, a path that is
        a URL or leaves the root, one video with two labels in two lines; "|" in a label without
        `multi_label`, not one label with it.
    """
    if not os.fspath(path):
        raise UserError("no data is given: name a list or a folder of videos")
    location = storage.path_of(path)
    if storage.is_folder(location):
        return _read_folder(location, classes, known)
    base = storage.path_of(root) if root else location.parent
    return _read_list(location, base, classes, labelled, known, multi_label)


def class_names(path: str | os.PathLike) -> tuple[str, ...]:
    """The names of the class folders in a folder, in the order of the labels."""
    return tuple(storage.display_name(name) for name in _class_folders(path))


def read_class_names(path: str | os.PathLike) -> tuple[str, ...]:
    """Reads a file with one class name a line, in the order of the labels.

    path: the file, or one of `class_names.DATASETS`, whose names ship: k400.

    Raises:
      UserError: the file cannot be read, is empty, or has a name missing or twice.
    """
    if is_dataset(path):
        return of_dataset(os.fspath(path))
    lines = text_of(path).rstrip().split("\n")
    names = tuple(line.strip() for line in lines)
    for number, name in enumerate(names, 1):
        if not name or name in names[: number - 1]:
            problem = f"class {name!r} is there before" if name else "a class name is missing"
            raise UserError(f"{path}, line {number}: {problem}")
    return names


def _class_folders(folder: str | os.PathLike) -> list[str]:
    """The class folders in a folder, sorted; the index in this order is the label."""
    return sorted(name for name in storage.folders_in(folder) if not name.startswith("."))


def _read_folder(
    folder: epath.Path, classes: int | None, known: KnownNames | None
) -> tuple[list[Example], tuple[str, ...]]:
    names = _class_folders(folder)
    shown = tuple(storage.display_name(name) for name in names)
    labels = {name: label for label, name in enumerate(names)}
    if known and all(name in known for name in shown):
        labels = {name: known.label(s, str(folder)) for name, s in zip(names, shown, strict=True)}
        shown, classes = known.names, None
    root = _absolute(folder)
    examples = [
        Example(storage.display_name(video), labels[video.split("/")[0]], os.path.join(root, video))
        for video in _videos(storage.files_below(folder, names))
    ]
    if not examples:
        raise UserError(
            f"{folder}: holds no class folders with videos, nor what a finished `prepare` leaves"
        )
    if classes is not None and len(names) != classes:
        # The label is an index into the sorted names: one folder more or less would shift them.
        raise UserError(f"{folder}: holds {len(names)} class folders where {classes} are expected")
    return examples, shown


def videos_below(folder: epath.Path) -> list[epath.Path]:
    """All files with a video suffix in a folder and its folders.

    Hidden ones and the films of --mode=predict are left out.
    """
    return [folder / video for video in _videos(storage.files_below(folder))]


def _videos(files: Iterable[str]) -> list[str]:
    """The videos among relative paths, sorted folder by folder."""
    videos = (
        file
        for file in files
        if os.path.splitext(file)[1].lower() in VIDEO_SUFFIXES
        and not os.path.basename(file).startswith(".")
        and not file.endswith(OWN_FILM)
    )
    return sorted(videos, key=lambda video: video.split("/"))


def _read_list(
    path: epath.Path,
    root: epath.Path,
    classes: int | None,
    labelled: bool,
    known: KnownNames | None,
    multi_label: bool,
) -> tuple[list[Example], tuple[str, ...] | None]:
    rows, named = read_rows(path, root, labelled, multi_label)
    if labelled:
        _check_labels(path, rows, known, multi_label)
        if named:
            _check_names(path, rows)
    if not named:
        known = None  # labels are numbers
    elif not known:
        texts = (text for _, row in rows for text in label_texts(row[1], multi_label))
        known = _listed_names(path, texts, classes)
    names = known.names if known else None

    absolute = _absolute(root)
    examples = []
    first_lines: dict[str, tuple[int, Label]] = {}  # source -> line number, label
    for number, (text, cell) in rows:
        where = f"{path}, line {number}"
        name = path_inside(where, text, absolute)
        label = _label_in(where, cell, classes, known, multi_label) if labelled else 0
        example = _example(where, name, label, absolute)
        before, first = first_lines.setdefault(example.source, (number, label))
        if first != label:
            labels = [_spelled(one, names) for one in (label, first)]
            hint = "; write all labels of a video in one line, with | between them"
            raise UserError(
                f"{where}: {example.id} has label {labels[0]}, but {labels[1]} in "
                f"line {before}{hint if multi_label else ''}"
            )
        examples.append(example)
    return examples, names


def _example(where: str, name: str, label: Label, root: str) -> Example:
    """The video of a line. Raises UserError for bytes that are neither UTF-8 nor a file's name."""
    example = Example(storage.display_name(name), label, os.path.join(root, name))
    if example.id != name and not os.path.exists(example.source):
        raise UserError(
            f"{where}: is not UTF-8, and there is no file {example.id}; write the list as UTF-8"
        )
    return example


def _label_in(
    where: str, cell: str, classes: int | None, known: KnownNames | None, multi_label: bool
) -> Label:
    """The label of a video from the cell of its line. known: the names, if labels are names."""
    found = [
        _named_label(where, known, text) if known else _label(where, classes, text)
        for text in label_texts(cell, multi_label)
    ]
    return tuple(sorted(set(found))) if multi_label else found[0]


def _check_labels(
    path: epath.Path, rows: Sequence[Row], known: KnownNames | None, multi_label: bool
) -> None:
    """Raises UserError for a label that is several, unless `multi_label`; then, if there is none.

    A name with a "|" in it may be known.
    """
    if multi_label:
        if not any(label for _, (_, label) in rows):
            raise UserError(f"{path}: no video has a label; write one a line: path,label")
        return
    for number, (_, label) in rows:
        if SEPARATOR in label and not (known and label in known):
            raise UserError(
                f"{path}, line {number}: {label!r} is several labels, which only "
                "--config.train.multi_label=True reads"
            )


def _check_names(path: epath.Path, rows: Sequence[Row]) -> None:
    """Raises UserError for a label that is not UTF-8, and where all labels are names of videos."""
    for number, (_, label) in rows:
        if (shown := storage.display_name(label)) != label:
            raise UserError(
                f"{path}, line {number}: label {shown} is not UTF-8; write the list as UTF-8"
            )
    if len(_videos(label for _, (_, label) in rows)) == len(rows):
        raise UserError(f"{path}: the second column holds the videos; write path,label")


def _spelled(label: Label, names: Sequence[str] | None) -> str:
    """The labels of a video as an error shows them."""
    return SEPARATOR.join(repr(names[i]) if names else str(i) for i in labels_of(label)) or "none"


def _listed_names(path: epath.Path, labels: Iterable[str], classes: int | None) -> KnownNames:
    """The sorted names of a list, each as it is spelled first."""
    spelled: dict[str, str] = {}
    for name in labels:
        spelled.setdefault(normalized(name), name)
    if classes is not None and len(spelled) != classes:
        # The label is an index into the sorted names: one more or less would shift them.
        raise UserError(f"{path}: names {len(spelled)} classes where {classes} are expected")
    return KnownNames(sorted(spelled.values()), str(path))


def _named_label(where: str, known: KnownNames, name: str) -> int:
    if not name:
        raise UserError(f"{where}: the label is missing")
    return known.label(name, where)


def _absolute(folder: epath.Path) -> str:
    return os.fspath(folder) if storage.is_remote(folder) else os.path.abspath(folder)


def _label(where: str, classes: int | None, text: str) -> int:
    if not re.fullmatch(r"-?[0-9]+", text):
        raise UserError(
            f"{where}: label {text!r} is no integer; labels are all numbers, or all "
            "names after a comma, tab or semicolon"
        )
    # int() refuses thousands of digits.
    label = int(text) if len(text) <= len(str(MAX_LABEL)) else MAX_LABEL + 1
    if not 0 <= label <= MAX_LABEL or (classes is not None and label >= classes):
        most = MAX_LABEL if classes is None else classes - 1
        allowed = "0 or more" if label < 0 and classes is None else f"one of 0..{most}"
        raise UserError(f"{where}: label {text[:40]} must be {allowed}")
    return label


def check_file_name(where: str, text: str) -> None:
    """Raises UserError for half a surrogate pair, which JSON can write, and no file name has."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise UserError(f"{where}: path {text!r} is no file name: half of a character") from None


def path_inside(where: str, text: str, root: str) -> str:
    """The path relative to the root. Links are not followed: one may lead out of the root.

    where: the place of the path, for messages. Raises UserError for a path outside, a URL, or as
    `check_file_name`.
    """
    check_file_name(where, text)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise UserError(f"{where}: path {text!r} is a URL; write what comes after the root {root}")
    is_local = os.path.isabs(text) and not storage.is_remote(root)
    name = os.path.normpath(os.path.relpath(text, root) if is_local else text)
    if not text or "\0" in text or name == "." or name.split("/")[0] in ("", ".."):
        raise UserError(f"{where}: path {text!r} is not inside the root {root}")
    return name
