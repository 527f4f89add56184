"""Several sources of videos as one, each with its weight and rules, for training without labels.

A mixture is a CSV file with a source a line, of which only the first column must be there:

    list,root,weight,flip
    k710/train.csv,k710/videos,1,yes
    ssv2/train.csv,ssv2/videos,2,no

list: what `annotations.open_source` takes; its labels, if it has any, are not looked at. root: of
its paths. weight: how often one of its videos is drawn, relative to those of other sources: with 2,
twice as often as with 1. flip: whether a mirrored video still shows the same; where hands and
directions matter, as in Something-Something, it does not. Lists and roots are relative to the
folder of the mixture.
"""

import csv
import dataclasses
import hashlib
import io
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import grain
import numpy as np

from fluxvit_jax import storage
from fluxvit_jax.data.annotations import Record, Source, open_source, split_of, text_of
from fluxvit_jax.errors import UserError

COLUMNS = ("list", "root", "weight", "flip")
WORDS = {"yes": True, "no": False}


class Part(NamedTuple):
    """One source of a mixture; name: its list, as the mixture writes it."""

    name: str
    source: Source
    weight: float = 1.0
    flip: bool = True


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The videos of several sources, one after another; the ids say which each is from."""

    parts: tuple[Part, ...]
    class_names: None = None

    @cached_property
    def fingerprint(self) -> str:
        """Of the sources, their weights and rules."""
        rows = [f"{part.source.fingerprint} {part.weight} {part.flip}\n" for part in self.parts]
        return hashlib.sha256("".join(rows).encode()).hexdigest()

    @property
    def ids(self) -> list[str] | None:
        """With the weights and rules, by which hosts could differ as well."""
        own = [part.source.ids for part in self.parts]
        if None in own:
            return None
        return [
            f"{part.name}/{id} {part.weight} {part.flip}"
            for part, ids in zip(self.parts, own, strict=True)
            for id in ids
        ]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self.parts[number]
        record = part.source[index - int(self._ends[number]) + len(part.source)]
        return record._replace(id=f"{part.name}/{record.id}", flip=part.flip)

    def order(self, seed: int) -> Any:
        """The numbers of the videos in the order in which they are drawn, without end.

        Each source has its own permutations, one after another. The sources take turns by their
        weights: any run of draws has each one's share to within a draw or so.
        """
        own = []
        for number, (part, end) in enumerate(zip(self.parts, self._ends, strict=True)):
            places = grain.MapDataset.range(int(end) - len(part.source), int(end))
            own.append(places.seed((seed + number) % 2**32).shuffle().repeat())
        return grain.MapDataset.mix(own, [len(part.source) * part.weight for part in self.parts])

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(part.source) for part in self.parts])


def open_mixture(path: str | os.PathLike, root: str | os.PathLike | None = None) -> Mixture:
    """Opens a mixture, or a single source as one, by whether its first line begins with "list".

    root: of a single source.

    Raises UserError: as `annotations.open_source`; a line of the mixture is not as it should be.
    """
    if not _is_mixture(path):
        return Mixture((Part(os.fspath(path), open_source(path, root, labelled=False)),))
    rows = csv.reader(io.StringIO(text_of(path)), skipinitialspace=True)
    columns = [column.strip() for column in next(rows)]
    if unknown := [column for column in columns if column not in COLUMNS]:
        raise UserError(f"{path}, line 1: {unknown[0]!r} is none of {', '.join(COLUMNS)}")
    parts = [_part(path, rows.line_num, columns, row) for row in rows if row]
    if not parts:
        raise UserError(f"{path}: names no source; write one a line: {','.join(COLUMNS)}")
    return Mixture(tuple(parts))


def _is_mixture(path: str | os.PathLike) -> bool:
    if not os.fspath(path) or split_of(path)[1] or storage.is_folder(storage.path_of(path)):
        return False
    return text_of(path).split("\n", 1)[0].split(",")[0].strip() == COLUMNS[0]


def _part(path: str | os.PathLike, line: int, columns: Sequence[str], row: Sequence[str]) -> Part:
    where = f"{path}, line {line}"
    if len(row) > len(columns):
        raise UserError(f"{where}: {len(row)} columns where {','.join(columns)} are {len(columns)}")
    given = {c: text.strip() for c, text in zip(columns, row, strict=False) if text.strip()}
    if "list" not in given:
        raise UserError(f"{where}: names no list")
    folder = storage.path_of(path).parent
    root = os.fspath(folder / given["root"]) if "root" in given else None
    source = open_source(os.fspath(folder / given["list"]), root, labelled=False)
    return Part(given["list"], source, _weight(where, given), _flip(where, given))


def _weight(where: str, given: dict[str, str]) -> float:
    text = given.get("weight", "1")
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise UserError(f"{where}: the weight {text!r} is no number above 0")
    return weight


def _flip(where: str, given: dict[str, str]) -> bool:
    text = given.get("flip", "yes")
    if text not in WORDS:
        raise UserError(f"{where}: flip is {text!r}, neither yes nor no")
    return WORDS[text]
