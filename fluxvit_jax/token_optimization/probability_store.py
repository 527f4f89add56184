"""The probabilities that each cell of a search gave to the videos, kept for finding cascades."""

import io
import re
import zipfile
from collections import defaultdict

import numpy as np
from etils import epath

from fluxvit_jax.distributed import atomic, storage
from fluxvit_jax.distributed.hosts import compute_on_host0
from fluxvit_jax.distributed.mesh import host_index
from fluxvit_jax.errors import UserError

FOLDER = "probabilities"  # in that of the search
NAME = re.compile(r"(\d{8,})-(\d{8,})\.npz")  # of a chunk's file: its first video, and its end


class ProbabilityStore:
    """One file for each split, cell and chunk of videos, `first` up to `end`.

    Its name is SPLIT/CELL/FIRST-END.npz; chunks may overlap. A file is whole or not there, and its
    checksum is compared when it is read. Host 0 reads and writes; the other hosts know what is
    there.
    """

    def __init__(self, folder: epath.Path, keeps: bool = True):
        """keeps: whether to keep what is there; without results of this search it is of another.

        Raises UserError if it cannot be removed.
        """
        self._folder = folder / FOLDER
        if not keeps:
            compute_on_host0(self._remove)
        self._chunks: dict[tuple[str, str], set[tuple[int, int]]] = defaultdict(set)
        # 1 for each video that is there, by its number.
        self._known: dict[tuple[str, str], bytearray] = defaultdict(bytearray)
        for split, cell, first, end in compute_on_host0(self._list):
            self._note(split, cell, first, end)

    def has(self, split: str, first: int, end: int, cell: str) -> bool:
        """Whether those of all videos from number `first` up to `end` are there."""
        return self._known[split, cell].count(1, first, end) == end - first

    def add(self, split: str, first: int, cell: str, probabilities: np.ndarray) -> None:
        """Keeps those of the videos from number `first` on: float32 [videos, view counts, classes].

        Raises UserError if they cannot be written.
        """
        end = first + len(probabilities)
        self._note(split, cell, first, end)
        if host_index() != 0:
            return
        path, content = self._path(split, cell, first, end), io.BytesIO()
        np.savez(content, probabilities=probabilities.astype(np.float32))
        try:
            storage.make_folder(path.parent)
            atomic.write(path, content.getvalue())
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error

    def read(self, split: str, cell: str, videos: int) -> np.ndarray:
        """Those of the first videos of a split: float32 [videos, view counts, classes].

        Raises UserError: a file is missing or damaged.
        """
        parts: list[np.ndarray] = []
        read = 0
        for first, end in sorted(self._chunks[split, cell]):
            if first <= read < min(end, videos):
                parts.append(
                    self._read(self._path(split, cell, first, end), end - first)[read - first :]
                )
                read = end
        if read < videos:
            raise UserError(
                f"{self._folder / split / cell}: has nothing of video {read} of {videos}; remove "
                f"{self._folder} and run --mode=search again"
            )
        return np.concatenate(parts)[:videos]

    def _note(self, split: str, cell: str, first: int, end: int) -> None:
        self._chunks[split, cell].add((first, end))
        known = self._known[split, cell]
        known.extend(bytes(max(0, end - len(known))))
        known[first:end] = b"\1" * (end - first)

    def _remove(self) -> None:
        try:
            if self._folder.exists():
                self._folder.rmtree()
        except OSError as error:
            raise UserError(
                f"{self._folder}: is of another search and cannot be removed: "
                f"{error.strerror or error}"
            ) from error

    def _list(self) -> list[tuple[str, str, int, int]]:
        """Split, cell, first and end of each file."""
        if not self._folder.exists():
            return []
        return [  # file managers leave files of their own in any folder
            (split.name, cell.name, int(chunk[1]), int(chunk[2]))
            for split in self._folder.iterdir()
            if storage.is_folder(split)
            for cell in split.iterdir()
            if storage.is_folder(cell)
            for file in cell.iterdir()
            if (chunk := NAME.fullmatch(file.name))
        ]

    def _path(self, split: str, cell: str, first: int, end: int) -> epath.Path:
        return self._folder / split / cell / f"{first:08d}-{end:08d}.npz"

    def _read(self, path: epath.Path, videos: int) -> np.ndarray:
        """The array of a file, of so many videos."""
        try:
            with np.load(io.BytesIO(path.read_bytes())) as arrays:
                found = arrays["probabilities"]
            if len(found) != videos:
                raise ValueError(f"{len(found)} videos")
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path}: is missing or damaged; remove {self._folder} and run --mode=search again"
            ) from error
        return found
