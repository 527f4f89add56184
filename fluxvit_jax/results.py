"""What a search has found: kept as it comes, so that a kill loses nothing, and summed up.

`cells.jsonl` has a line for each cell and chunk of videos, in which each video is one character;
besides, lines for what could not be read and for each cell's cost. A line that a kill cut short is
dropped, and what it was about is done again.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from fluxvit_jax import atomic, distributed, parallel, storage
from fluxvit_jax.cells import Cell
from fluxvit_jax.errors import UserError
from fluxvit_jax.intervals import paired_difference, share_interval

FILE = "cells.jsonl"
FIRST, AMONG_FIRST, WRONG, FAILED = "15.-"  # a video: top-1, top-5, neither, could not be read
CHOOSE, REPORT = "choose", "report"  # the splits


class Results:
    """The lines of `cells.jsonl`; each addition is in its `atomic.LineFile` before it returns.

    about: what the results are of (weights, videos, views); a file about something else is refused.
    All hosts have them, and what host 0 finds in the file counts; only that one adds to it.
    """

    def __init__(self, folder: epath.Path, about: Mapping[str, Any]):
        """Reads what is there.

        Raises UserError for results of something else, or a file that cannot be written.
        """
        self._path = folder / FILE
        self._file: atomic.LineFile | None = None
        self._found: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
        self._failures: dict[str, dict[int, str]] = defaultdict(dict)
        self._costs: dict[str, dict[str, dict]] = defaultdict(dict)
        lines = distributed.from_first_host(self._read)
        if lines:
            self._check(lines[0], about)
        for line in lines[1:]:
            self._take(line)
        if parallel.host_index() == 0:
            self._open(lines or [{"about": dict(about)}])

    def add_found(self, split: str, first: int, cell: str, found: str) -> None:
        """What a cell made of the videos from number `first` on, a character each."""
        self._add({"split": split, "first": first, "cell": cell, "found": found})

    def add_failures(self, split: str, failures: Mapping[int, str]) -> None:
        """Numbers of videos that could not be read, with reasons; those known are left as is."""
        new = {str(n): why for n, why in failures.items() if n not in self._failures[split]}
        if new:
            self._add({"split": split, "failures": new})

    def add_cost(self, device: str, batch: int, program: str, cost: Mapping[str, float]) -> None:
        """The cost of a cell's program on a device."""
        self._add({"device": device, "batch": batch, "program": program, "cost": dict(cost)})

    def has(self, split: str, first: int, cell: str) -> bool:
        """Whether a cell has seen the chunk of videos that begins with number `first`."""
        return first in self._found[split, cell]

    def found(self, split: str, cell: str) -> str:
        """The videos that a cell has seen, from the first on without a gap."""
        chunks, text = self._found[split, cell], ""
        while len(text) in chunks:
            text += chunks[len(text)]
        return text

    def failures(self, split: str) -> dict[int, str]:
        """Number and reason of each video that could not be read."""
        return self._failures[split]

    def costs(self, device: str, batch: int) -> dict[str, dict[str, float]]:
        """The cost of each program on a device."""
        return self._costs[_table(device, batch)]

    def close(self) -> None:
        if self._file:
            self._file.close()

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, line: dict[str, Any]) -> None:
        self._take(line)
        if self._file:
            self._file.add(json.dumps(line))

    def _take(self, line: Mapping[str, Any]) -> None:
        match line:
            case {"split": split, "first": first, "cell": cell, "found": found}:
                self._found[split, cell][first] = found
            case {"split": split, "failures": failures}:
                self._failures[split] |= {int(number): why for number, why in failures.items()}
            case {"device": device, "batch": batch, "program": program, "cost": cost}:
                self._costs[_table(device, batch)][program] = cost

    def _read(self) -> list[dict[str, Any]]:
        with storage.errors(self._path):
            content = self._path.read_bytes() if self._path.exists() else b""
        lines = []
        for text in content.decode(errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
        return lines

    def _check(self, header: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        before = header.get("about")
        if not isinstance(before, Mapping):
            raise UserError(f"{self._path}: is no file of a search, or damaged; remove it")
        if wrong := [name for name in about if before.get(name) != about[name]]:
            raise UserError(
                f"{self._path}: holds results of another {', '.join(wrong)}; remove "
                f"{self._path.parent} or use another workdir"
            )

    def _open(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Writes anew what could be read, and stays open for more."""
        try:
            storage.make_folder(self._path.parent)
            atomic.write(self._path, "".join(json.dumps(line) + "\n" for line in lines))
            self._file = atomic.LineFile(self._path)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error.strerror}") from error


def _table(device: str, batch: int) -> str:
    return f"{device} x{batch}"


# ---------------------------------------------------------------------------------------------
# Summing up


def accuracy(found: str) -> dict[str, Any]:
    """Top-1 and top-5 with their intervals; videos that could not be read count as wrong."""
    videos, first = len(found), found.count(FIRST)
    five = first + found.count(AMONG_FIRST)
    return {
        "videos": videos,
        "top1": first / videos,
        "top1_interval": share_interval(first, videos),
        "top5": five / videos,
        "top5_interval": share_interval(five, videos),
    }


def difference(one: str, other: str) -> dict[str, Any]:
    """How much more of the videos that both have seen `one` has right, paired over them."""
    videos = min(len(one), len(other))
    right = [np.array([video == FIRST for video in found[:videos]]) for found in (one, other)]
    mean, interval = paired_difference(*right)
    return {"top1": mean, "interval": interval, "videos": videos}


def best(cells: Sequence[Cell], results: Results, videos: int) -> Cell | None:
    """The most accurate on the first videos of the choosing split; ties to fewer tokens.

    videos: cells that saw fewer do not count; 0: all that any cell has seen.
    """

    def rank(cell: Cell) -> tuple:
        found = results.found(CHOOSE, cell.name)
        found = found[: videos or len(found)]
        share = found.count(FIRST) / len(found)
        return -share, cell.budget, cell.grid.tokens, cell.name

    seen = [cell for cell in cells if len(results.found(CHOOSE, cell.name)) >= max(1, videos)]
    return min(seen, key=rank, default=None)


def choice(
    cells: Sequence[Cell], budget: int, results: Results, videos: int
) -> dict[str, Cell | None]:
    """The best cell of each method for a budget; videos: as in `best`."""
    rivals = [cell for cell in cells if cell.stands_for(budget)]
    return {
        method: best([cell for cell in rivals if cell.method == method], results, videos)
        for method in ("select", "plain", "merge")
    }


def gain(one: Cell | None, other: Cell | None, results: Results) -> dict[str, Any] | None:
    """How much more accurate a cell is than another on the reporting split, if that is known."""
    found = [results.found(REPORT, cell.name) if cell else "" for cell in (one, other)]
    return difference(*found) if all(found) else None
