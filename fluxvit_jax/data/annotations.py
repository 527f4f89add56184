"""Sources of videos: lists, folders of class folders, and prepared folders.

`open_source` turns any of the three into a `Source`, a random-access sequence of `Record`s. All may
be in a bucket (gs://), as may the videos of a local list. Bad input is a `UserError` that names the
file and the line.
"""

import csv
import dataclasses
import hashlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from etils import epath

from fluxvit_jax.data.chat_templates import Turn
from fluxvit_jax.data.class_names import KnownNames, is_dataset, normalized, of_dataset
from fluxvit_jax.data.random_streams import HOLDOUT_STREAM, stream_rng
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError

MAX_LABEL = 2**31 - 1  # labels are int32 on the device
SEPARATOR = "|"  # of several labels of a video

Label = int | tuple[int, ...]  # a tuple, rising, in multi-label lists
Segment = tuple[int, int]  # the first frame of a clip within a video, and the one after its last
Seconds = tuple[float, float]  # where a clip within a video begins and ends

# Names of columns are made of these words: path, video_id, ClassIndex.
_COLUMN_NAME = re.compile(
    r"#?\s*((path|video|vid|clip|file|name|image|img|sample|source|url|youtube"
    r"|label|class|category|target|action|id|uid|idx|index)(e?s)?[ _-]?)+",
    re.IGNORECASE,
)

_Row = tuple[int, list[str]]  # of a list: the number of a line, its path and label

VIDEO_SUFFIXES = {
    ".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4",
    ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv",
}  # fmt: skip


class Example(NamedTuple):
    """One line of a list.

    A NamedTuple rather than a dataclass: workers are sent hundreds of thousands of them.
    """

    id: str  # path relative to the root, "/" between its parts, as `storage.display_name` shows it
    label: Label
    source: str  # absolute path, or one of a bucket
    captions: tuple[str, ...] = ()
    segment: Segment | None = None  # None: the whole video, or its `seconds`
    conversation: tuple[Turn, ...] = ()
    seconds: Seconds | None = None


class Record(NamedTuple):
    """One video of a source."""

    id: str
    label: Label
    video: str | bytes  # the path, or the content of the file
    flip: bool = True  # whether training may mirror it
    failure: str = ""  # why the record cannot be read; then id and label are not known either
    captions: tuple[str, ...] = ()
    segment: Segment | None = None  # None: the whole video, or its `seconds`
    conversation: tuple[Turn, ...] = ()
    seconds: Seconds | None = None


@runtime_checkable
class Source(Protocol):
    """A random-access sequence of videos that pickles small enough for worker processes."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of the labels; None where unknown."""

    @property
    def fingerprint(self) -> str:
        """sha256 over ids, labels and byte sizes in order.

        The same on every machine and under every root, and the same for a list and for the folder
        prepared from it (if all of its videos went in).
        """

    @property
    def identity(self) -> dict[str, int | str]:
        """Comparison of sources without reading any file.

        {"videos": number, "ids": sha256 of all ids in order, "labels": sha256 of all labels in
        order}, of captioned videos "captions" in place of labels, of those with conversations
        "conversations"; of a folder prepared without these, {"videos": number, "content": sha256}.
        """

    @property
    def files(self) -> list[str] | None:
        """The absolute paths of all videos; None where only reading every video would tell."""

    @property
    def ids(self) -> list[str] | None:
        """The ids of all videos; None where only reading every video would tell."""

    @property
    def labels(self) -> Sequence[Label] | None:
        """The labels of all videos; None where only reading every video would tell."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def open_source(
    path: str | os.PathLike,
    root: str | os.PathLike | None = None,
    classes: int | None = None,
    labelled: bool = True,
    known: KnownNames | None = None,
    multi_label: bool = False,
) -> "FileSource | PreparedSource":
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
    if _is_prepared(folder):
        return _open_prepared(folder, split, classes)
    return FileSource(*read_named(path, root, classes, labelled, known, multi_label))


def is_list(path: str | os.PathLike) -> bool:
    """Whether `open_source` reads a path as a list, not as a folder."""
    return not _is_prepared(split_of(path)[0]) and not storage.is_folder(path)


def labels_of(label: Label) -> tuple[int, ...]:
    """All labels of a video."""
    return label if isinstance(label, tuple) else (label,)


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


def fingerprint(rows: Iterable[tuple[str, Label, int]]) -> str:
    """Hex sha256 over rows of (id, label, bytes of the video file), in order."""
    content = hashlib.sha256()
    for name, label, size in rows:
        content.update(f"{name}\t{label}\t{size}\n".encode())
    return content.hexdigest()


def identity(ids: Iterable[str], labels: Iterable[Label]) -> dict[str, int | str]:
    """`Source.identity` of ids and labels in order."""
    ids = list(ids)
    return {"videos": len(ids), "ids": digest(ids), "labels": digest(map(str, labels))}


def digest(lines: Iterable[str]) -> str:
    """Hex sha256 over lines."""
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


@dataclasses.dataclass(frozen=True)
class FileSource:
    """The videos of a list or of a folder of class folders."""

    examples: Sequence[Example]
    class_names: tuple[str, ...] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """See `Source`; looks up every size, once."""
        sizes = storage.file_sizes([example.source for example in self.examples])
        rows = zip(self.examples, sizes, strict=True)
        return fingerprint((example.id, example.label, size) for example, size in rows)

    @cached_property
    def identity(self) -> dict[str, int | str]:
        return identity(self.ids, self.labels)

    @property
    def files(self) -> list[str]:
        return [example.source for example in self.examples]

    @property
    def ids(self) -> list[str]:
        return [example.id for example in self.examples]

    @property
    def classes(self) -> int:
        """As many as there are names, or as the largest label tells."""
        largest = (max(labels_of(own.label), default=-1) for own in self.examples)
        return len(self.class_names or ()) or 1 + max(largest)

    @property
    def labels(self) -> list[Label]:
        return [example.label for example in self.examples]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Record:
        example = self.examples[index]
        return Record(
            example.id,
            example.label,
            example.source,
            captions=example.captions,
            segment=example.segment,
            conversation=example.conversation,
            seconds=example.seconds,
        )


@dataclasses.dataclass(frozen=True)
class PreparedSource:
    """One split of a folder written by `prepare`."""

    folder: str
    records: Any  # TFDS's data source: a random-access sequence of dicts of id, label, video
    class_names: tuple[str, ...] | None
    fingerprint: str
    identity: dict[str, int | str]
    classes: int  # as many as there are names, or as the largest label tells
    images: bool = False  # whether it is of images with captions
    ids: None = None
    labels: None = None
    files: None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            record = self.records[index]
        except RuntimeError as error:  # by the checksums of array_record, one for each record
            shown = f"{os.path.basename(self.folder)}, record {index}"
            return Record(shown, 0, b"", failure=f"the shard is damaged here: {error}")
        name = record["id"].decode(errors="backslashreplace")
        if "captions" not in record:
            return Record(name, int(record["label"]), record["video"])
        first, end = map(int, record["segment"])
        return Record(
            name,
            int(record["label"]),
            record["video"],
            captions=tuple(text.decode() for text in record["captions"]),
            segment=(first, end) if first >= 0 else None,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """A selection of another source's videos, in the order of `numbers`, int [n]."""

    source: Source
    numbers: np.ndarray

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.source.class_names

    @cached_property
    def fingerprint(self) -> str:
        """See `Source`; depends on the source's fingerprint and the numbers."""
        numbers = self.numbers.astype("<i8").tobytes()
        return hashlib.sha256(self.source.fingerprint.encode() + numbers).hexdigest()

    @cached_property
    def identity(self) -> dict[str, int | str]:
        numbers = hashlib.sha256(self.numbers.astype("<i8").tobytes()).hexdigest()
        digests = {
            name: digest([str(value), numbers])
            for name, value in self.source.identity.items()
            if name != "videos"
        }
        return {"videos": len(self), **digests}

    @property
    def files(self) -> list[str] | None:
        files = self.source.files
        return None if files is None else [files[number] for number in self.numbers]

    @property
    def ids(self) -> list[str] | None:
        ids = self.source.ids
        return None if ids is None else [ids[number] for number in self.numbers]

    @property
    def labels(self) -> list[Label] | None:
        labels = self.source.labels
        return None if labels is None else [labels[number] for number in self.numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.numbers[index])]

    def first(self, videos: int) -> "Subset":
        """The subset of the first `videos`."""
        return Subset(self.source, self.numbers[:videos])


def training_part(source: Source, held_out: float) -> Source:
    """The training part of a source when a fraction of it, 0 to 1, is held out."""
    if not held_out:
        return source
    return Subset(source, np.sort(_shuffled(source)[round(held_out * len(source)) :]))


def held_out_part(source: Source, held_out: float) -> Subset:
    """The held-out part of a source in random order: the complement of `training_part`."""
    return Subset(source, _shuffled(source)[: round(held_out * len(source))])


def shuffled(source: Source) -> Subset:
    """All videos of a source in a random order, the same each time."""
    return held_out_part(source, 1.0)


def _shuffled(source: Source) -> np.ndarray:
    """A permutation of the source's numbers that depends on its length, not on a config's seed."""
    return stream_rng(0, 0, HOLDOUT_STREAM).permutation(len(source))


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
    """All files with a video suffix in a folder and its folders, without hidden ones."""
    return [folder / video for video in _videos(storage.files_below(folder))]


def _videos(files: Iterable[str]) -> list[str]:
    """The videos among relative paths, sorted folder by folder."""
    videos = (
        file
        for file in files
        if os.path.splitext(file)[1].lower() in VIDEO_SUFFIXES
        and not os.path.basename(file).startswith(".")
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
    rows, named = _rows(path, root, labelled, multi_label)
    if labelled:
        _check_labels(path, rows, known, multi_label)
    if not named:
        known = None  # labels are numbers
    elif not known:
        texts = (text for _, row in rows for text in _labels(row[1], multi_label))
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


def _rows(
    path: epath.Path, root: epath.Path, labelled: bool, multi_label: bool
) -> tuple[list[_Row], bool]:
    """The lines of a list without its header, and whether their labels are names."""
    lines = text_of(path, errors="surrogateescape").split("\n")
    if not storage.is_folder(root):
        raise UserError(f"{path}: the root of its paths, {root}, is no folder")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    delimiter = _delimiter([line for _, line in numbered], labelled)
    rows = [
        (number, _columns(path, number, line, delimiter, labelled)) for number, line in numbered
    ]
    # In a list of names all that tells a header is that there is no such file.
    named = (
        labelled
        and delimiter is not None
        and not any(_is_number(text) for _, row in rows for text in _labels(row[1], multi_label))
    )
    if rows and _is_header(rows[0][1], root, labelled and not named):
        del rows[0]
    if not rows:
        raise UserError(f"{path}: holds no videos; write one a line: path,label")
    return rows, named


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
        for text in _labels(cell, multi_label)
    ]
    return tuple(sorted(set(found))) if multi_label else found[0]


def _labels(cell: str, multi_label: bool) -> list[str]:
    """The labels in a cell of a list."""
    if not multi_label:
        return [cell]
    return [text.strip() for text in cell.split(SEPARATOR)] if cell else []


def _check_labels(
    path: epath.Path, rows: Sequence[_Row], known: KnownNames | None, multi_label: bool
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


def _is_number(label: str) -> bool:
    """Whether a label was meant as a number; "nan" stands for a missing one."""
    return (
        re.fullmatch(r"[-+]?[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?|nan", label, re.IGNORECASE) is not None
    )


def _delimiter(lines: Sequence[str], labelled: bool) -> str | None:
    """The column separator of most lines: a tab, comma or semicolon, None for blanks."""
    delimiters = ("\t", ",", ";", None)
    separates = _precedes_label if labelled else _ends_path
    counts = [sum(separates(delimiter, line) for line in lines) for delimiter in delimiters]
    if any(counts):
        return delimiters[counts.index(max(counts))]  # ties go to the first
    if not labelled:
        return None
    # No line has a number for a label, so labels are names.
    counts = [sum(_is_pair(delimiter, line) for line in lines) for delimiter in "\t,;"]
    if any(counts):
        return "\t,;"[counts.index(max(counts))]
    # The columns that were probably meant make the clearest error.
    return next((d for d in "\t,;" if any(d in line for line in lines)), None)


def _is_pair(delimiter: str, line: str) -> bool:
    try:
        return len(_csv_columns(line, delimiter)) == 2
    except csv.Error:
        return False


def _precedes_label(delimiter: str | None, line: str) -> bool:
    label = rf"-?[0-9]+(\{SEPARATOR}-?[0-9]+)*"  # one or several
    return re.search(rf'{delimiter or "[ ]"}\s*"?{label}"?\s*$', line) is not None


def _ends_path(delimiter: str | None, line: str) -> bool:
    """Whether a path ends at a delimiter, in a list whose other columns do not matter."""
    if delimiter is None or delimiter not in line:
        return False
    try:
        columns = _csv_columns(line, delimiter)
    except csv.Error:
        return True
    # A line that looks like one path with a comma in it is one path.
    return _has_suffix(columns[0]) or not _has_suffix(columns[-1])


def _has_suffix(name: str) -> bool:
    return re.search(r"\.\w+$", name) is not None


def _absolute(folder: epath.Path) -> str:
    return os.fspath(folder) if storage.is_remote(folder) else os.path.abspath(folder)


def text_of(path: str | os.PathLike, errors: str = "strict") -> str:
    """The text of a file with \\n as line end. Raises UserError if it cannot be read.

    errors: "surrogateescape" keeps bytes that are not UTF-8, which file names may contain.
    """
    try:
        content = storage.read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        if b"\0" in content:  # no file name has it, but UTF-16 does
            errors = "strict"
        # Universal newlines: all line ends become \n.
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", errors=errors).read()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None


def _columns(
    path: epath.Path, number: int, line: str, delimiter: str | None, labelled: bool
) -> list[str]:
    """Path and label of a line; the label is "" unless `labelled`.

    The delimiter None splits at the last blanks; with any other the line is CSV.
    """
    if delimiter is None and not labelled:  # numbers at the end are labels or frame counts
        return [re.sub(r"(\s+-?\d+)+$", "", line.strip()), ""]
    if delimiter is None:
        columns = line.rsplit(maxsplit=1)
        if len(columns) == 2 and re.search(r"\s-?[0-9]+$", columns[0]):  # frame counts, say
            columns = line.split()
    else:
        try:
            columns = _csv_columns(line, delimiter)
        except csv.Error as error:
            raise UserError(f"{path}, line {number}: is not valid CSV: {error}") from None
    if not labelled:
        return [columns[0], ""]
    if len(columns) != 2:
        raise UserError(f"{path}, line {number}: {len(columns)} columns where path,label are 2")
    return [columns[0].strip(), columns[1]]


def _csv_columns(line: str, delimiter: str) -> list[str]:
    # A line at a time: a quote left open is an error of its line, not of all that follow.
    row = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True))
    return [column.strip() for column in row]


def _is_header(columns: Sequence[str], root: epath.Path, labelled: bool) -> bool:
    """Whether a first line names columns; in doubt it is taken for a video."""
    first, second = columns
    if not _COLUMN_NAME.fullmatch(first):
        return False
    if labelled:
        return _COLUMN_NAME.fullmatch(second) is not None
    with storage.errors(root):
        return not (root / first).exists()


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


def path_inside(where: str, text: str, root: str) -> str:
    """The path relative to the root. Links are not followed: one may lead out of the root.

    where: the place of the path, for messages. Raises UserError for a path outside, or a URL.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise UserError(f"{where}: path {text!r} is a URL; write what comes after the root {root}")
    is_local = os.path.isabs(text) and not storage.is_remote(root)
    name = os.path.normpath(os.path.relpath(text, root) if is_local else text)
    if not text or "\0" in text or name == "." or name.split("/")[0] in ("", ".."):
        raise UserError(f"{where}: path {text!r} is not inside the root {root}")
    return name


def split_of(path: str | os.PathLike) -> tuple[str, str | None]:
    """Folder and split of `FOLDER:SPLIT`; the split is None if not given."""
    match = re.fullmatch(r"(.+):(\w+)", os.fspath(path))
    return (match[1], match[2]) if match else (os.fspath(path), None)


def _is_prepared(folder: str) -> bool:
    with storage.errors(folder):
        return bool(folder) and (storage.path_of(folder) / "dataset_info.json").exists()


def prepared_builder(folder: str | os.PathLike) -> Any:
    """The read-only TFDS builder of a folder written by `prepare`.

    `builder.info.metadata["splits"][split]` holds the split's fingerprint, max_label, videos,
    quarantined and plan.

    Raises:
      UserError: its metadata is damaged, or not that of `prepare`.
    """
    import tensorflow_datasets as tfds  # late: not needed for lists

    try:
        builder = tfds.builder_from_directory(folder)
        if set(builder.info.splits) <= set(builder.info.metadata["splits"]):
            return builder
        reason = "metadata.json lacks a split"
    except Exception as error:  # TFDS raises what the parsers below it do
        reason = f"{type(error).__name__} {error}"
    raise UserError(f"{folder}: is no folder of `prepare`: {' '.join(reason.split())}")


def _open_prepared(folder: str, split: str | None, classes: int | None) -> PreparedSource:
    builder = prepared_builder(folder)
    about, features = builder.info.metadata["splits"], builder.info.features
    split = _chosen_split(folder, split, sorted(builder.info.splits))
    if classes is not None and about[split]["max_label"] >= classes:
        raise UserError(
            f"{folder}: label {about[split]['max_label']} must be one of 0..{classes - 1}"
        )
    with storage.errors(folder):
        present = {file.name for file in storage.path_of(folder).iterdir()}
    for shard in builder.info.splits[split].filenames:
        if shard not in present:
            raise UserError(f"{folder}: shard {shard} is missing")
    names = tuple(getattr(features["label"], "names", ())) or None
    return PreparedSource(
        folder=folder,
        records=builder.as_data_source(split),
        class_names=names,
        classes=len(names or ()) or 1 + about[split]["max_label"],
        fingerprint=about[split]["fingerprint"],
        identity=_prepared_identity(about[split]),
        images=bool(about[split].get("images", False)),
    )


def _prepared_identity(about: Any) -> dict[str, int | str]:
    """`Source.identity` by the metadata of a prepared split."""
    if "ids" not in about:  # prepared by a version without ids
        return {"videos": about["videos"], "content": about["fingerprint"]}
    return {n: about[n] for n in ("videos", "ids", "captions" if "captions" in about else "labels")}


def _chosen_split(folder: str, split: str | None, splits: list[str]) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split not in splits:
        raise UserError(f"{folder}: holds {', '.join(splits)}; name one: {folder}:{splits[0]}")
    return split
