"""What there is to train on: lists of videos, folders of class folders, prepared folders.

`open_source` turns any of the three into a `Source`, a random-access sequence of `Record`s. All may
be in a bucket (gs://), and so may the videos of a list of this machine. Bad input is a `UserError`
that names the file and the line.
"""

import csv
import dataclasses
import hashlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np
from etils import epath

from fluxvit_jax import storage
from fluxvit_jax.data.sampling import stream_rng
from fluxvit_jax.errors import UserError

HELD_OUT_STREAM = 3  # which videos a list gives up; beside the streams of `sampling`, `pipeline`

VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv"),
)


class Example(NamedTuple):
    """One line of a list: where a video is and what it shows."""

    id: str  # path relative to the root, "/" between its parts
    label: int
    source: str  # absolute path, or one of a bucket


class Record(NamedTuple):
    """One video of a source: its path, or the bytes of its file.

    flip: whether a mirrored video still shows the same.
    """

    id: str
    label: int
    video: str | bytes
    flip: bool = True


class Source(Protocol):
    """A random-access sequence of videos that pickles small enough for worker processes.

    `class_names` is None where they are not known. `fingerprint` names the content: a sha256 over
    ids, labels and byte sizes in order, the same on every machine and under every root, and the
    same for a list and for the folder prepared from it (if all of its videos went in).
    """

    class_names: tuple[str, ...] | None

    @property
    def fingerprint(self) -> str: ...

    @property
    def ids(self) -> list[str] | None:
        """The ids of all videos; None where only reading every video would tell."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def open_source(
    path: str | os.PathLike,
    root: str | os.PathLike | None = None,
    classes: int | None = None,
    labelled: bool = True,
) -> Source:
    """Opens a list, a folder of class folders, or a folder written by `prepare`.

    Args:
      path: the list or folder. A prepared folder of several splits takes `FOLDER:SPLIT`.
      root: folder that the paths of a list are relative to (default: the folder of the list);
        of no meaning for folders.
      classes: number of classes, to check the labels against.
      labelled: whether labels are wanted; otherwise a list needs none, and all are 0.

    Raises:
      UserError: see `read_annotations`; a prepared folder that is damaged, lacks the split
        or a shard, or has a label out of range; a bucket that cannot be read.
    """
    folder, split = split_of(path)
    if _is_prepared(folder):
        return _open_prepared(folder, split, classes)
    examples = read_annotations(path, root, classes, labelled)
    return FileSource(examples, class_names(path) if storage.is_folder(path) else None)


def read_annotations(
    path: str | os.PathLike,
    root: str | os.PathLike | None = None,
    classes: int | None = None,
    labelled: bool = True,
) -> list[Example]:
    """Reads a list of videos or a folder of class folders.

    A list has a video a line, `path,label`: UTF-8, two columns apart by a comma (with CSV quoting),
    a tab or blanks, as in its first line; the first line may be a header. In a folder of class
    folders the label is the index of the sorted class names.

    Args:
      path: the list or folder.
      root: folder that the paths of a list are relative to (default: the folder of the list).
      classes: number of classes; labels must be below it, and a folder must have just as many.
      labelled: False for the paths alone: other columns are not looked at and need not be there.

    Raises:
      UserError: the list, folder or root is missing or empty; with the line number, a wrong number
        of columns, a label that is no integer or out of range, a path that is a URL or leaves
        the root.
    """
    if not os.fspath(path):
        raise UserError("no data is given: name a list or a folder of videos")
    path = storage.path_of(path)
    if storage.is_folder(path):
        return _read_folder(path, classes)
    root = storage.path_of(root) if root else path.parent
    return _read_list(path, root, classes, labelled)


def class_names(path: str | os.PathLike) -> tuple[str, ...]:
    """The sorted names of the class folders in a folder; a name's index is its label."""
    return tuple(sorted(name for name in storage.folders_in(path) if not name.startswith(".")))


def read_class_names(path: str | os.PathLike) -> tuple[str, ...]:
    """Reads the name of a class a line, in the order of the labels.

    Raises:
      UserError: the file cannot be read, is empty, or has a name missing or twice.
    """
    lines = text_of(path).rstrip().split("\n")
    names = tuple(line.strip() for line in lines)
    for number, name in enumerate(names, 1):
        if not name or name in names[: number - 1]:
            problem = f"class {name!r} is there before" if name else "a class name is missing"
            raise UserError(f"{path}, line {number}: {problem}")
    return names


def fingerprint(rows: Iterable[tuple[str, int, int]]) -> str:
    """Hex sha256 over rows of (id, label, bytes of the video file), in order."""
    digest = hashlib.sha256()
    for name, label, size in rows:
        digest.update(f"{name}\t{label}\t{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


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

    @property
    def ids(self) -> list[str]:
        return [example.id for example in self.examples]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Record:
        return Record(*self.examples[index])


@dataclasses.dataclass(frozen=True)
class PreparedSource:
    """One split of a folder written by `prepare`."""

    folder: str
    records: Any  # of TFDS: a random-access sequence of dicts of id, label, video
    class_names: tuple[str, ...] | None
    fingerprint: str
    ids: None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            record = self.records[index]
        except RuntimeError as error:  # what array_record raises for a damaged shard
            raise UserError(f"{self.folder}: record {index} cannot be read: {error}") from error
        return Record(os.fsdecode(record["id"]), int(record["label"]), record["video"])


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """Videos of another source, those of `numbers` in that order."""

    source: Source
    numbers: np.ndarray  # int [n]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.source.class_names

    @cached_property
    def fingerprint(self) -> str:
        """Of the source and of what was taken from it."""
        numbers = self.numbers.astype("<i8").tobytes()
        return hashlib.sha256(self.source.fingerprint.encode() + numbers).hexdigest()

    @property
    def ids(self) -> list[str] | None:
        ids = self.source.ids
        return None if ids is None else [ids[number] for number in self.numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.numbers[index])]

    def first(self, videos: int) -> "Subset":
        """Its first videos."""
        return Subset(self.source, self.numbers[:videos])


def training_part(source: Source, held_out: float) -> Source:
    """What training uses of a source when it leaves out a share of `held_out`, 0 to 1."""
    if not held_out:
        return source
    return Subset(source, np.sort(_shuffled(source)[_held(source, held_out) :]))


def held_out_part(source: Source, held_out: float) -> Subset:
    """What training leaves out, in random order: the rest of `training_part`."""
    return Subset(source, _shuffled(source)[: _held(source, held_out)])


def shuffled(source: Source) -> Subset:
    """All videos of a source in a random order, the same each time."""
    return held_out_part(source, 1.0)


def _held(source: Source, share: float) -> int:
    return round(share * len(source))


def _shuffled(source: Source) -> np.ndarray:
    """Its numbers in an order that depends on how many there are, not on any config's seed."""
    return stream_rng(0, 0, HELD_OUT_STREAM).permutation(len(source))


def _read_folder(folder: epath.Path, classes: int | None) -> list[Example]:
    names = class_names(folder)
    labels = {name: label for label, name in enumerate(names)}
    root = _absolute(folder)
    examples = [
        Example(video, labels[video.split("/")[0]], os.path.join(root, video))
        for video in _videos(storage.files_below(folder, names))
    ]
    if not examples:
        raise UserError(
            f"{folder}: holds no class folders with videos, nor what a finished `prepare` leaves"
        )
    if classes is not None and len(names) != classes:
        # The label is a place in the sorted names: one folder more or less would shift them.
        raise UserError(f"{folder}: holds {len(names)} class folders where {classes} are expected")
    return examples


def videos_below(folder: epath.Path) -> list[epath.Path]:
    """All video files in a folder and its folders, by their suffix; hidden ones are left out."""
    return [folder / video for video in _videos(storage.files_below(folder))]


def _videos(files: Iterable[str]) -> list[str]:
    """The videos among relative paths, folder by folder."""
    videos = []
    for file in files:
        name = os.path.basename(file)
        if os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES and not name.startswith("."):
            videos.append(file)
    return sorted(videos, key=lambda video: video.split("/"))


def _read_list(
    path: epath.Path, root: epath.Path, classes: int | None, labelled: bool
) -> list[Example]:
    lines = text_of(path).split("\n")
    if not storage.is_folder(root):
        raise UserError(f"{path}: the root of its paths, {root}, is no folder")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    delimiter = next((d for d in ",\t" if numbered and d in numbered[0][1]), None)
    rows = [
        (number, _columns(path, number, line, delimiter, labelled)) for number, line in numbered
    ]
    if rows and _is_header(*rows[0][1]):
        del rows[0]
    if not rows:
        raise UserError(f"{path}: holds no videos; write one a line: path,label")
    root = _absolute(root)
    return [
        Example(
            name,
            _label(path, number, label, classes) if labelled else 0,
            os.path.join(root, name),
        )
        for number, (text, label) in rows
        for name in [_inside(path, number, text, root)]
    ]


def _absolute(folder: epath.Path) -> str:
    return os.fspath(folder) if storage.is_remote(folder) else os.path.abspath(folder)


def text_of(path: str | os.PathLike) -> str:
    """The text of a file, its lines ended by \\n. Raises UserError if it cannot be read."""
    try:
        content = storage.read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        # All line ends become \n.
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None


def _columns(
    path: epath.Path, number: int, line: str, delimiter: str | None, labelled: bool
) -> list[str]:
    """Path and label of a line, "" for one that is not wanted.

    The delimiter None splits at runs of blanks, else it is CSV.
    """
    if delimiter is None and not labelled:  # numbers at the end are labels and the like
        return [re.sub(r"(\s+-?\d+)+$", "", line.strip()), ""]
    try:
        columns = line.split() if delimiter is None else _csv_columns(line, delimiter)
    except csv.Error as error:
        raise UserError(f"{path}, line {number}: is not valid CSV: {error}") from None
    if not labelled:
        return [columns[0], ""]
    if len(columns) != 2:
        raise UserError(f"{path}, line {number}: {len(columns)} columns where path,label are 2")
    return columns


def _csv_columns(line: str, delimiter: str) -> list[str]:
    # A line at a time: a quote left open is an error of its line, not of all that follow.
    row = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True))
    return [column.strip() for column in row]


def _is_header(first: str, second: str) -> bool:
    """Whether a first line names columns: no number for a label and no file for a path."""
    return not re.fullmatch(r"-?\d+", second) and not PurePosixPath(first).suffix


def _label(path: epath.Path, number: int, text: str, classes: int | None) -> int:
    if not re.fullmatch(r"-?[0-9]+", text):
        raise UserError(f"{path}, line {number}: label {text!r} is no integer")
    label = int(text)
    if label < 0 or (classes is not None and label >= classes):
        allowed = "0 or more" if classes is None else f"one of 0..{classes - 1}"
        raise UserError(f"{path}, line {number}: label {label} must be {allowed}")
    return label


def _inside(path: epath.Path, number: int, text: str, root: str) -> str:
    """The path relative to the root. Links are not followed: one may lead out of the root."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise UserError(
            f"{path}, line {number}: path {text!r} is a URL; write what comes after the root {root}"
        )
    own = os.path.isabs(text) and not storage.is_remote(root)
    name = os.path.normpath(os.path.relpath(text, root) if own else text)
    if not text or "\0" in text or name == "." or name.split("/")[0] in ("", ".."):
        raise UserError(f"{path}, line {number}: path {text!r} is not inside the root {root}")
    return name


def split_of(path: str | os.PathLike) -> tuple[str, str | None]:
    """`FOLDER:SPLIT` in its two parts; the split is None where there is none."""
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
    return PreparedSource(
        folder=folder,
        records=builder.as_data_source(split),
        class_names=tuple(getattr(features["label"], "names", ())) or None,
        fingerprint=about[split]["fingerprint"],
    )


def _chosen_split(folder: str, split: str | None, splits: list[str]) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split not in splits:
        raise UserError(f"{folder}: holds {', '.join(splits)}; name one: {folder}:{splits[0]}")
    return split
