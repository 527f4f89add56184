"""Append-only log of a search's results, and the numbers computed from it.

`cells.jsonl` has a line for each candidate (a cell) and chunk of videos, one character per video,
besides lines for unreadable videos and for each candidate's cost. A line that is damaged, or that a
kill cut short, is dropped and its work is done again.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from fluxvit_jax.distributed import atomic, checksums, storage
from fluxvit_jax.distributed.hosts import compute_on_host0
from fluxvit_jax.distributed.mesh import host_index
from fluxvit_jax.errors import UserError
from fluxvit_jax.reports.confidence_intervals import paired_difference, share_interval
from fluxvit_jax.token_optimization.candidates import Candidate

FILE = "cells.jsonl"
TOP1, TOP5, WRONG, FAILED = "15.-"  # a video's outcome: top-1, top-5, neither, could not be read
UNKNOWN = b" "  # that of a video that was not evaluated
CHOOSE, REPORT = "choose", "report"  # the splits


class ResultsLog:
    """Append-only JSONL log of search results; each addition is in the file when it returns.

    The header says what the results are of (weights, videos, views) and must match on resume.
    Host 0 reads and writes the file; the other hosts receive a copy.
    """

    def __init__(self, folder: epath.Path, about: Mapping[str, Any]):
        """Reads the file if there is one. about: the header.

        Raises UserError: results of something else, or a file that cannot be written.
        """
        self._path = folder / FILE
        self._file: atomic.LineFile | None = None
        # A character for each video, by its number.
        self._outcomes: dict[tuple[str, str], bytearray] = defaultdict(bytearray)
        self._failures: dict[str, dict[int, str]] = defaultdict(dict)
        self._costs: dict[tuple[str, int], dict[str, dict[str, float]]] = defaultdict(dict)
        lines = compute_on_host0(lambda: checksums.read_lines(self._path))
        if lines:
            self._check(lines[0], about)
        for line in lines[1:]:
            self._take(line)
        if host_index() == 0:
            self._open(lines or [{"about": dict(about)}])

    def add_outcomes(self, split: str, first: int, cell: str, outcomes: str) -> None:
        """Outcomes of the videos from number `first` on, one character per video."""
        self._add({"split": split, "first": first, "cell": cell, "found": outcomes})

    def add_failures(self, split: str, failures: Mapping[int, str]) -> None:
        """Numbers of unreadable videos with reasons; known ones are not added again."""
        new = {str(n): why for n, why in failures.items() if n not in self._failures[split]}
        if new:
            self._add({"split": split, "failures": new})

    def add_cost(self, device: str, batch: int, program: str, cost: Mapping[str, float]) -> None:
        """The cost of a candidate's program on a device."""
        self._add({"device": device, "batch": batch, "program": program, "cost": dict(cost)})

    def has(self, split: str, first: int, end: int, cell: str) -> bool:
        """Whether all videos from number `first` up to `end` have been evaluated."""
        known = self._outcomes[split, cell]
        return len(known) >= end and UNKNOWN not in known[first:end]

    @property
    def is_empty(self) -> bool:
        """Whether no video has been evaluated."""
        return not any(self._outcomes.values())

    def outcomes(self, split: str, cell: str) -> str:
        """Outcomes of the evaluated videos, from the first on without a gap."""
        return self._outcomes[split, cell].partition(UNKNOWN)[0].decode()

    def failures(self, split: str) -> dict[int, str]:
        """Number and reason of each unreadable video."""
        return self._failures[split]

    def costs(self, device: str, batch: int) -> dict[str, dict[str, float]]:
        """The cost of each program on a device."""
        return self._costs[device, batch]

    def close(self) -> None:
        if self._file:
            self._file.close()

    def __enter__(self) -> "ResultsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, line: dict[str, Any]) -> None:
        self._take(line)
        if self._file:
            self._file.add(checksums.to_line(line))

    def _take(self, line: Mapping[str, Any]) -> None:
        match line:
            case {"split": split, "first": first, "cell": cell, "found": outcomes}:
                # Chunks are of any size: eval.batch_size may change from one run to the next.
                known = self._outcomes[split, cell]
                known.extend(UNKNOWN * (first - len(known)))
                known[first : first + len(outcomes)] = outcomes.encode()
            case {"split": split, "failures": failures}:
                self._failures[split] |= {int(number): why for number, why in failures.items()}
            case {"device": device, "batch": batch, "program": program, "cost": cost}:
                self._costs[device, batch][program] = cost

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
        """Rewrites the file with its readable lines, and opens it to append more."""
        try:
            storage.make_folder(self._path.parent)
            checksums.write_lines(self._path, lines)
            self._file = atomic.LineFile(self._path)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error.strerror}") from error


# ---------------------------------------------------------------------------------------------
# Summary


def accuracy(outcomes: str) -> dict[str, Any]:
    """Top-1 and top-5 with their intervals; unreadable videos count as wrong."""
    videos, top1 = len(outcomes), outcomes.count(TOP1)
    top5 = top1 + outcomes.count(TOP5)
    return {
        "videos": videos,
        "top1": top1 / videos,
        "top1_interval": share_interval(top1, videos),
        "top5": top5 / videos,
        "top5_interval": share_interval(top5, videos),
    }


def difference(a: str, b: str) -> dict[str, Any]:
    """By how much outcomes `a` have a higher top-1 than `b`, paired over their common videos."""
    videos = min(len(a), len(b))
    right = [np.array([video == TOP1 for video in text[:videos]]) for text in (a, b)]
    mean, interval = paired_difference(*right)
    return {"top1": mean, "interval": interval, "videos": videos}


def best(candidates: Sequence[Candidate], results: ResultsLog, videos: int) -> Candidate | None:
    """The most accurate on the first videos of the choosing split; ties to fewer tokens.

    videos: candidates evaluated on fewer do not count; 0: all videos of each candidate count.
    """
    outcomes = {c.name: results.outcomes(CHOOSE, c.name) for c in candidates}

    def rank(candidate: Candidate) -> tuple[float, int, int, str]:
        text = outcomes[candidate.name]
        text = text[: videos or len(text)]
        share = text.count(TOP1) / len(text)
        return -share, candidate.budget, candidate.grid.tokens, candidate.name

    evaluated = [c for c in candidates if len(outcomes[c.name]) >= max(1, videos)]
    return min(evaluated, key=rank, default=None)


def choice(
    candidates: Sequence[Candidate], budget: int, results: ResultsLog, videos: int
) -> dict[str, Candidate | None]:
    """The best candidate of each method for a budget; videos: as in `best`."""
    rivals = [candidate for candidate in candidates if candidate.matches_budget(budget)]
    return {
        method: best([c for c in rivals if c.method == method], results, videos)
        for method in ("select", "plain", "merge")
    }


def gain(a: Candidate | None, b: Candidate | None, results: ResultsLog) -> dict[str, Any] | None:
    """By how much `a` is more accurate than `b` on the reporting split; None if not known."""
    if a is None or b is None:
        return None
    texts = results.outcomes(REPORT, a.name), results.outcomes(REPORT, b.name)
    return difference(*texts) if all(texts) else None
