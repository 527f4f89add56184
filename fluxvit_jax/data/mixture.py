"""Weighted mixtures of video sources, for training without labels, or on captions.

A mixture is a CSV file with a source a line; only its first column is required:

    list,root,weight,flip
    k710/train.csv,k710/videos,1,yes
    ssv2/train.csv,ssv2/videos,2,no

list: what `annotations.open_source` takes; labels are ignored. root: what the paths of the list are
relative to. weight: how often each video is drawn relative to videos of other sources: with 2,
twice as often as with 1. flip: whether training may mirror the videos; "no" where hands and
directions matter, as in Something-Something. Lists and roots are relative to the folder of the
mixture. Images are videos of one frame; those with captions have steps of their own.

Images among videos are videos of one frame. Images with captions have steps of their own.
"""

import csv
import dataclasses
import hashlib
import io
import os
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from fluxvit_jax.data.annotations import open_source
from fluxvit_jax.data.caption_lists import open_captioned
from fluxvit_jax.data.images import is_image
from fluxvit_jax.data.list_rows import text_of
from fluxvit_jax.data.prepared_source import PreparedSource, split_of
from fluxvit_jax.data.sources import Record, Source, Subset, digest
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError

COLUMNS = ("list", "root", "weight", "flip")
WORDS = {"yes": True, "no": False}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One source of a mixture."""

    name: str  # its list as the mixture writes it, see `storage.display_name`
    source: Source
    weight: float = 1.0
    flip: bool = True
    images: bool = False  # whether it has steps of its own, as one-frame clips

    @property
    def share(self) -> float:
        """Its share of the draws, relative to other parts."""
        return len(self.source) * self.weight


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The concatenated videos of several sources; each id starts with the name of its part."""

    parts: tuple[Part, ...]
    class_names: None = None
    files: None = None
    labels: None = None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the fingerprints, weights and flip rules of the parts."""
        rows = [f"{part.source.fingerprint} {part.weight} {part.flip}\n" for part in self.parts]
        return hashlib.sha256("".join(rows).encode()).hexdigest()

    @cached_property
    def identity(self) -> dict[str, int | str]:
        """See `Source`; with weights and flip rules, without labels."""
        rows = [
            f"{part.source.identity.get('ids', part.source.fingerprint)} {part.weight} {part.flip}"
            for part in self.parts
        ]
        own = {}
        for name in ("captions", "conversations"):
            texts = [str(part.source.identity.get(name, "")) for part in self.parts]
            if any(texts):
                own[name] = digest(texts)
        return {"videos": len(self), "ids": digest(rows), **own}

    @property
    def ids(self) -> list[str] | None:
        """See `Source`; with weights and flip rules, in which hosts could differ as well."""
        names = []
        for part in self.parts:
            if (ids := part.source.ids) is None:
                return None
            names += [f"{part.name}/{id} {part.weight} {part.flip}" for id in ids]
        return names

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = self._part_of(index)
        part = self.parts[number]
        record = part.source[index - int(self._ends[number]) + len(part.source)]
        return record._replace(id=f"{part.name}/{record.id}", flip=part.flip)

    @property
    def image_share(self) -> float:
        """The share of steps that show images, where they have steps of their own."""
        return sum(p.share for p in self.parts if p.images) / sum(p.share for p in self.parts)

    def order(self, seed: int, images: bool = False) -> Any:
        """The endless drawing order: a `grain.MapDataset` of numbers of videos.

        Each source runs through seeded permutations of its videos. The sources are interleaved by
        their weights: any run of draws holds each source's share to within about one draw.

        images: the order of the images that have steps of their own, not of the rest.
        """
        import grain  # here, since workers get the mixture, and would import JAX with it

        orders, shares = [], []
        for number, (part, end) in enumerate(zip(self.parts, self._ends, strict=True)):
            if part.images == images:
                numbers = grain.MapDataset.range(int(end) - len(part.source), int(end))
                orders.append(numbers.seed((seed + number) % 2**32).shuffle().repeat())
                shares.append(part.share)
        return grain.MapDataset.mix(orders, shares)

    def like(self, index: int) -> np.ndarray:
        """The numbers of all that are drawn in the steps of video `index`: int [n]."""
        own = self.parts[self._part_of(index)].images
        ends = zip(self.parts, self._ends, strict=True)
        return np.concatenate(
            [np.arange(end - len(part.source), end) for part, end in ends if part.images == own]
        )

    def _part_of(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    @cached_property
    def _ends(self) -> np.ndarray:
        """Number after the last video of each part: int [parts]."""
        return np.cumsum([len(part.source) for part in self.parts])


def open_mixture(
    path: str | os.PathLike, root: str | os.PathLike | None = None, captioned: bool = False
) -> Mixture:
    """Opens a mixture, which is a file whose first line begins with "list", or a single source.

    root: what the paths of a single source are relative to. captioned: whether the lists are of
    videos with captions.

    Raises UserError: as `annotations.open_source`, or as `caption_lists.open_captioned`; a line of
    the mixture is not as it should be.
    """
    open_list = open_captioned if captioned else partial(open_source, labelled=False)
    if not _is_mixture(path):
        part = Part(name=storage.display_name(path), source=open_list(path, root))
        return mixed([part], captioned)
    text = text_of(path, errors="surrogateescape")
    rows = csv.reader(io.StringIO(text), skipinitialspace=True)
    columns = [column.strip() for column in next(rows)]
    if unknown := [column for column in columns if column not in COLUMNS]:
        raise UserError(f"{path}, line 1: {unknown[0]!r} is none of {', '.join(COLUMNS)}")
    parts = [_part(open_list, path, rows.line_num, columns, row) for row in rows if row]
    if not parts:
        raise UserError(f"{path}: names no source; write one a line: {','.join(COLUMNS)}")
    return mixed(parts, captioned)


def mixed(parts: Sequence[Part], with_texts: bool) -> Mixture:
    """The mixture of parts; with captions or conversations, images become parts of their own."""
    if not with_texts:
        return Mixture(tuple(parts))
    split = []
    for part in parts:
        if isinstance(part.source, PreparedSource):  # of one medium
            split.append(dataclasses.replace(part, images=part.source.images))
            continue
        images = np.array([is_image(file) for file in part.source.files or ()])
        for own in (False, True):
            numbers = np.flatnonzero(images == own)
            if len(numbers):
                whole = len(numbers) == len(part.source)
                source = part.source if whole else Subset(part.source, numbers)
                split.append(dataclasses.replace(part, source=source, images=own))
    return Mixture(tuple(split))


def _is_mixture(path: str | os.PathLike) -> bool:
    if not os.fspath(path) or split_of(path)[1] or storage.is_folder(storage.path_of(path)):
        return False
    text = text_of(path, errors="surrogateescape")
    return text.split("\n", 1)[0].split(",")[0].strip() == COLUMNS[0]


def _part(
    open_list: Callable[..., Source],
    path: str | os.PathLike,
    line: int,
    columns: Sequence[str],
    row: Sequence[str],
) -> Part:
    where = f"{path}, line {line}"
    if len(row) > len(columns):
        raise UserError(f"{where}: {len(row)} columns where {','.join(columns)} are {len(columns)}")
    given = {c: text.strip() for c, text in zip(columns, row, strict=False) if text.strip()}
    if "list" not in given:
        raise UserError(f"{where}: names no list")
    folder = storage.path_of(path).parent
    root = os.fspath(folder / given["root"]) if "root" in given else None
    source = open_list(os.fspath(folder / given["list"]), root)
    weight = _weight(where, given.get("weight", "1"))
    flip = given.get("flip", "yes")
    if flip not in WORDS:
        raise UserError(f"{where}: flip is {flip!r}, neither yes nor no")
    return Part(
        name=storage.display_name(given["list"]),
        source=source,
        weight=weight,
        flip=WORDS[flip],
    )


def _weight(where: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise UserError(f"{where}: the weight {text!r} is no number above 0")
    return weight
