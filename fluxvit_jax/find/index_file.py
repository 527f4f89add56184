"""The index of a folder of videos: a plain `.npz` of unit vectors, and of what they are."""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from fluxvit_jax.distributed import atomic
from fluxvit_jax.errors import UserError


class Settings(NamedTuple):
    """What all vectors of an index have in common.

    model: checksum of the weights; tokens, frames, resolution: the budget and the grid, in pixels;
    window, stride: seconds, 0 where each video is one moment.
    """

    model: str
    tokens: int
    frames: int
    resolution: int
    window: float
    stride: float

    def difference(self, other: "Settings") -> str:
        """In which way another index is not of these settings, in words; "" if it is."""
        if self.model != other.model:
            return "of another model"
        for name, own, theirs in zip(self._fields, self, other, strict=True):
            if own != theirs:
                return f"with {name} {theirs:g}, not {own:g}"
        return ""


class Moment(NamedTuple):
    """A part of a video that has a vector; times in seconds, both 0 if the file tells no rate."""

    start: float
    end: float


class Version(NamedTuple):
    """By which a changed file is told: bytes, and the time of its last change in nanoseconds."""

    size: int
    changed: int


UNKNOWN = Version(0, 0)  # of a file in a bucket, or in an index that was made without versions


@dataclass
class Index:
    """An index in memory.

    folder: of the videos, as a whole path; moments: of each file, by its path in the folder;
    vectors: of each file, float32 [its moments, D], unit; versions: of each file, when it was read.
    failures: why a file, or a moment of it, could not be read.
    """

    settings: Settings
    folder: str
    moments: dict[str, list[Moment]] = field(default_factory=dict)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    versions: dict[str, Version] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self.moments.values()))


def save(index: Index, path: Path) -> None:
    """Writes an index whole or not at all.

    Arrays: vectors float32 [N, D]; video int32 [N], which of `files`, str [F]; versions int64
    [F, 2] of these; start and end float64 [N], seconds; failures str [M, 2], path and reason;
    folder, model, tokens, frames, resolution, window, stride: one value each.

    Raises OSError.
    """
    files = sorted(index.moments)
    counts = [len(index.moments[name]) for name in files]
    moments = [moment for name in files for moment in index.moments[name]]
    vectors = [index.vectors[name] for name in files]
    versions = [index.versions.get(name, UNKNOWN) for name in files]
    content = io.BytesIO()
    arrays: dict[str, Any] = {
        "vectors": np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float32),
        "video": np.repeat(np.arange(len(files), dtype=np.int32), counts),
        "files": np.array(files, np.str_),
        "versions": np.array(versions, np.int64).reshape(-1, 2),
        "start": np.array([moment.start for moment in moments], np.float64),
        "end": np.array([moment.end for moment in moments], np.float64),
        "failures": np.array(sorted(index.failures.items()), np.str_).reshape(-1, 2),
        "folder": np.array(index.folder, np.str_),
        **{name: np.array(value) for name, value in index.settings._asdict().items()},
    }
    np.savez(content, **arrays)
    atomic.write(epath.Path(path), content.getvalue())


def load(path: Path) -> Index:
    """The index in a file. Raises UserError if there is none, or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return _index_of(dict(arrays.items()))
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no index; make one: python -m fluxvit_jax.find index VIDEOS "
            "--checkpoint=DIR --tokens=N --out=INDEX.npz"
        ) from None
    except (OSError, TypeError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: is no index, or a damaged one: {error}") from error


def _index_of(arrays: dict[str, np.ndarray]) -> Index:
    settings = Settings(**{name: arrays[name].item() for name in Settings._fields})
    vectors, number = arrays["vectors"], arrays["video"]
    if not len(vectors) == len(number) == len(arrays["start"]) == len(arrays["end"]):
        raise ValueError("its arrays are of different lengths")
    index = Index(settings, str(arrays["folder"]))
    edges = np.searchsorted(number, np.arange(len(arrays["files"]) + 1))
    for name, first, last in zip(map(str, arrays["files"]), edges[:-1], edges[1:], strict=True):
        times = zip(arrays["start"][first:last], arrays["end"][first:last], strict=True)
        index.moments[name] = [Moment(float(start), float(end)) for start, end in times]
        index.vectors[name] = vectors[first:last]
    if "versions" in arrays:
        versions = (Version(*version) for version in arrays["versions"].tolist())
        index.versions = dict(zip(index.moments, versions, strict=True))
    index.failures = {str(name): str(reason) for name, reason in arrays["failures"]}
    return index


def flattened(index: Index) -> tuple[np.ndarray, Sequence[tuple[str, Moment]]]:
    """All vectors, [N, D], and the file and the moment of each."""
    places = [(name, moment) for name, own in index.moments.items() for moment in own]
    vectors = list(index.vectors.values())
    return np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float32), places
