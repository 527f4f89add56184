"""The probabilities that each cell of a search gave to the videos, kept for finding cascades."""

import io
import zipfile

import numpy as np
from etils import epath

from fluxvit_jax.distributed import atomic, storage
from fluxvit_jax.distributed.hosts import compute_on_host0
from fluxvit_jax.distributed.mesh import host_index
from fluxvit_jax.errors import UserError

FOLDER = "probabilities"  # in that of the search


class ProbabilityStore:
    """One file for each split, cell and chunk of videos: SPLIT/CELL/FIRST.npz.

    A file is whole or not there, and its checksum is compared when it is read. Host 0 reads and
    writes; the other hosts know what is there.
    """

    def __init__(self, folder: epath.Path):
        self._folder = folder / FOLDER
        self._known = set(compute_on_host0(self._list))

    def has(self, split: str, first: int, cell: str) -> bool:
        """Whether those of the chunk of videos from number `first` on are there."""
        return _name(split, first, cell) in self._known

    def add(self, split: str, first: int, cell: str, probabilities: np.ndarray) -> None:
        """Keeps those of the videos from number `first` on: float32 [videos, view counts, classes].

        Raises UserError if they cannot be written.
        """
        name = _name(split, first, cell)
        self._known.add(name)
        if host_index() != 0:
            return
        path, content = self._folder / name, io.BytesIO()
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
        while (first := sum(map(len, parts))) < videos:
            parts.append(self._read(self._folder / _name(split, first, cell)))
        return np.concatenate(parts)[:videos]

    def _list(self) -> list[str]:
        if not self._folder.exists():
            return []
        return [
            f"{split.name}/{cell.name}/{file.name}"
            for split in self._folder.iterdir()
            for cell in split.iterdir()
            for file in cell.iterdir()
            if file.suffix == ".npz"
        ]

    def _read(self, path: epath.Path) -> np.ndarray:
        try:
            with np.load(io.BytesIO(path.read_bytes())) as arrays:
                found = arrays["probabilities"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path}: is missing or damaged; remove {self._folder} and run --mode=search again"
            ) from error
        if not len(found):
            raise UserError(f"{path}: holds no videos; remove it and run --mode=search again")
        return found


def _name(split: str, first: int, cell: str) -> str:
    return f"{split}/{cell}/{first:08d}.npz"
