"""Sources of videos: random-access sequences of `Record`s, and parts of them."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from fluxvit_jax.data.chat_templates import Turn
from fluxvit_jax.data.random_streams import HOLDOUT_STREAM, stream_rng
from fluxvit_jax.distributed import storage

Label = int | tuple[int, ...]  # a tuple, rising, in multi-label lists
Segment = tuple[int, int]  # the first frame of a clip within a video, and the one after its last
Seconds = tuple[float, float]  # where a clip within a video begins and ends


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


def labels_of(label: Label) -> tuple[int, ...]:
    """All labels of a video."""
    return label if isinstance(label, tuple) else (label,)


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

    @cached_property
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

    @cached_property
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
