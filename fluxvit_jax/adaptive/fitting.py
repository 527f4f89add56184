"""Finds cascades from the probabilities that cells gave to the same videos, without any network.

Every sequence of cells of rising cost, rule of confidence and way of averaging is swept over all
thresholds at once: the numbers of right answers and of videos that go on are cumulative histograms
over the confidences. What is left is the Pareto front of accuracy and mean cost.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from fluxvit_jax.adaptive.cascade import CONFIDENCES, Cascade, Step, averaged, confidence
from fluxvit_jax.evaluation.calibration import at_temperature

# Thresholds tried at a step: between any two videos' confidences up to so many, then quantiles.
MAX_CUTS = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A possible step and what it says of n videos.

    step: with its temperature, without a threshold; probabilities: float32 [n, C], at temperature
    1; cost: of a video; shared: the part of it that a later step on the same grid need not pay.
    """

    step: Step
    probabilities: np.ndarray
    cost: float
    shared: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A cascade, its mean cost of a video, and its accuracy or what it is credited with of it."""

    cascade: Cascade
    cost: float
    right: float

    @property
    def steps(self) -> Sequence[Step]:
        return self.cascade.steps


class _HasCost(Protocol):
    """What a front is made of: cascades and rules of motion."""

    @property
    def cost(self) -> float: ...
    @property
    def right(self) -> float: ...
    @property
    def steps(self) -> Sequence[Step]: ...


Way = TypeVar("Way", bound=_HasCost)


def costs_of(entries: Sequence[Entry]) -> list[float]:
    """What each step of a cascade costs a video that reaches it."""
    costs: list[float] = []
    for number, entry in enumerate(entries):
        before = entries[:number]
        if before and entry.step.goes_on(before[-1].step):
            costs.append(entry.cost - before[-1].cost)
        else:
            ranked = any(one.step.covers(entry.step) for one in before)
            costs.append(entry.cost - (entry.shared if ranked else 0.0))
    return costs


def front(
    entries: Sequence[Entry],
    labels: np.ndarray,
    max_steps: int = 3,
    confidences: Sequence[str] = CONFIDENCES,
    max_cuts: int = MAX_CUTS,
) -> list[Found]:
    """The Pareto front of cascades by mean cost and accuracy, the cheapest first.

    Steps rise in cost and do not fall in budget. Ties go to fewer steps. Single cells are cascades
    of one step, at temperature 1.

    labels: int [n], the class of each video.
    """
    ordered = sorted(entries, key=lambda entry: (entry.cost, entry.step.cell, entry.step.views))
    best = pareto([_single(entry, labels) for entry in ordered])
    for mean in (False, True):
        sweep = _Sweep(ordered, labels, mean, confidences, max_cuts)
        for found in sweep.longer([], max_steps):
            best = pareto([*best, *found])
    return best


def credited(found: Sequence[Found], entries: Sequence[Entry], labels: np.ndarray) -> list[Found]:
    """The front of a front and the single cells, by what each is credited with.

    The best of thousands of thresholds is flattered. What `right` becomes of a cascade of several
    steps is `credit`; it stays if no cell or cascade that costs no more has as much.

    found: of `front`, for these entries and labels.
    """
    by_step = {(entry.step.cell, entry.step.views): entry for entry in entries}
    cells = [entry.probabilities.argmax(axis=1) == labels for entry in entries]

    def ask(cascade: Cascade) -> Callable[[int, np.ndarray], np.ndarray]:
        own = [by_step[step.cell, step.views].probabilities for step in cascade.steps]
        return lambda number, videos: own[number][videos]

    def less_flattery(one: Found) -> Found:
        answers = one.cascade.run(len(labels), ask(one.cascade)).probabilities
        return replace(one, right=credit(answers.argmax(axis=1) == labels, cells))

    singles = [_single(entry, labels) for entry in entries]
    return pareto([*singles, *(less_flattery(one) for one in found if len(one.steps) > 1)])


def credit(right: np.ndarray, cells: Sequence[np.ndarray]) -> float:
    """Accuracy less one standard error of its difference, paired by video, from the best cell's.

    After the one-standard-error rule ("Classification and Regression Trees", 1984): what thresholds
    gained by a choice among many must be more than chance to be preferred to a simple cell.

    right: bool [n], which videos are right; cells: the same of each single cell.
    """
    gain = right.astype(float) - max(cells, key=np.sum)
    return float(right.mean() - gain.std(ddof=1) / np.sqrt(len(gain)))


def pareto(found: Iterable[Way]) -> list[Way]:
    """Those that no other beats in accuracy at no more cost, by rising cost and accuracy."""
    kept: list[Way] = []
    for one in sorted(found, key=lambda one: (one.cost, -one.right, len(one.steps))):
        if not kept or one.right > kept[-1].right:
            kept.append(one)
    return kept


def _single(entry: Entry, labels: np.ndarray) -> Found:
    step = replace(entry.step, temperature=1.0, weight=1.0, threshold=None)
    share = float((entry.probabilities.argmax(axis=1) == labels).mean())
    return Found(cascade=Cascade((step,)), cost=entry.cost, right=share)


class _Node(NamedTuple):
    """A step in a sequence: what a cascade says of the videos once it has joined the average.

    right: float [n], 1 where the average is right; average: [n, C]; cuts, bins: by rule of
    confidence, the thresholds, and how many of them each video reaches: int [n].
    """

    entry: Entry
    step: Step
    average: np.ndarray
    right: np.ndarray
    cuts: dict[str, np.ndarray]
    bins: dict[str, np.ndarray]


class _Sweep:
    """All sequences with one way of averaging: the mean of all steps, or the last step alone."""

    def __init__(
        self,
        entries: Sequence[Entry],
        labels: np.ndarray,
        mean: bool,
        confidences: Sequence[str],
        max_cuts: int,
    ):
        self._entries, self._labels, self._mean = entries, labels, mean
        self._confidences, self._max_cuts = confidences, max_cuts
        self._scaled = [at_temperature(e.probabilities, e.step.temperature) for e in entries]

    def longer(self, nodes: list[_Node], max_steps: int) -> Iterator[list[Found]]:
        """The fronts of the sequences that begin with some nodes and have more.

        What the nodes say is computed once for all of them.
        """
        if len(nodes) == max_steps:
            return
        for number, entry in enumerate(self._entries):
            if nodes and not _may_follow(nodes[-1].entry, entry):
                continue
            is_last = len(nodes) + 1 == max_steps
            node = self._node(number, nodes[-1] if nodes else None, len(nodes) + 1, is_last)
            for kind in self._confidences if nodes else ():
                yield _thresholds([*nodes, node], kind)
            yield from self.longer([*nodes, node], max_steps)

    def _node(self, number: int, before: _Node | None, position: int, is_last: bool) -> _Node:
        entry, own = self._entries[number], self._scaled[number]
        step = replace(entry.step, weight=1 / position if self._mean else 1.0)
        average = averaged(own, before.average if before else None, step.weight)
        right = (average.argmax(axis=1) == self._labels).astype(float)
        cuts, bins = {}, {}
        for kind in () if is_last else self._confidences:
            sure = confidence(kind, average, own, before.average if before else None)
            cuts[kind] = np.append(cuts_between(sure, self._max_cuts), 2.0)  # nobody is so sure
            bins[kind] = np.searchsorted(cuts[kind][:-1], sure, side="right")
        return _Node(entry, step, average, right, cuts, bins)


def _may_follow(earlier: Entry, later: Entry) -> bool:
    """Whether a step may come directly after another one."""
    return earlier.cost < later.cost and earlier.step.budget <= later.step.budget


def _thresholds(nodes: Sequence[_Node], kind: str) -> list[Found]:
    """The front of one sequence and rule over all thresholds."""
    n, early = len(nodes[0].right), nodes[:-1]
    bins, dims = [one.bins[kind] for one in early], tuple(len(one.cuts[kind]) for one in early)
    hits, costs = np.zeros(dims), np.zeros(dims)
    for number, cost in enumerate(costs_of([one.entry for one in nodes])):
        shape = dims[:number] + (1,) * (len(dims) - number)
        reached, right = bins[:number], nodes[number].right
        costs += cost * _going_on(np.ones(n), reached, dims).reshape(shape)
        hits += _going_on(right, reached, dims).reshape(shape)
        if number < len(dims):
            shape = dims[: number + 1] + (1,) * (len(dims) - number - 1)
            hits -= _going_on(right, bins[: number + 1], dims).reshape(shape)
    found = []
    for at in _pareto_indices(costs.ravel(), hits.ravel()):
        chosen = zip(early, np.unravel_index(at, dims), strict=True)
        steps = [replace(one.step, threshold=float(one.cuts[kind][i])) for one, i in chosen]
        found.append(
            Found(
                cascade=Cascade((*steps, nodes[-1].step), kind),
                cost=float(costs.ravel()[at]) / n,
                right=float(hits.ravel()[at]) / n,
            )
        )
    return found


def _going_on(values: np.ndarray, bins: Sequence[np.ndarray], dims: tuple[int, ...]) -> np.ndarray:
    """Sums of values [n] over the videos that go on after `bins`, for all of their thresholds.

    A video goes on after a step at threshold j if its bin there is j at most.
    """
    own = dims[: len(bins)]
    at = np.ravel_multi_index(tuple(bins), own) if bins else np.zeros(len(values), int)
    sums = np.bincount(at, values, minlength=int(np.prod(own))).reshape(own)
    for axis in range(len(bins)):
        sums = sums.cumsum(axis)
    return sums


def cuts_between(values: np.ndarray, most: int) -> np.ndarray:
    """Thresholds between different values, ascending, fewer than `most`.

    Midpoints, so that rounding on another machine seldom moves a video across.
    """
    distinct = np.unique(values.astype(float))
    if len(distinct) > most:
        distinct = np.unique(np.quantile(distinct, np.linspace(0, 1, most)))
    return (distinct[:-1] + distinct[1:]) / 2


def _pareto_indices(costs: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Where no other entry has more hits at no more cost."""
    order = np.lexsort((-hits, costs))
    most = np.maximum.accumulate(hits[order])
    rises = np.append(True, most[1:] > most[:-1])
    return order[rises]
