"""Finds cascades from the probabilities that cells gave to the same videos, without any network.

Every sequence of cells of rising cost, rule of confidence and way of averaging is swept over all
thresholds at once: the numbers of right answers and of videos that go on are cumulative histograms
over the confidences. What is left is the Pareto front of accuracy and mean cost.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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
    """A cascade, its mean cost of a video, and the share of videos whose answer is right."""

    cascade: Cascade
    cost: float
    right: float


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

    Ties go to fewer steps, then to the first tried. Single cells are cascades of one step, at
    temperature 1.

    labels: int [n], the class of each video.
    """
    best: list[Found] = []
    for own in sequences(entries, max_steps):
        if len(own) == 1:
            best.append(_single(own[0], labels))
            continue
        for kind, mean in itertools.product(confidences, (False, True)):
            best += _sweep(own, labels, kind, mean, max_cuts)
        best = pareto(best)
    return pareto(best)


def sequences(entries: Sequence[Entry], max_steps: int) -> Iterator[tuple[Entry, ...]]:
    """Entries of rising cost and no falling budget, the shorter sequences first."""
    ordered = sorted(entries, key=lambda entry: (entry.cost, entry.step.cell, entry.step.views))
    for length in range(1, max_steps + 1):
        for own in itertools.combinations(ordered, length):
            if all(
                a.cost < b.cost and a.step.budget <= b.step.budget
                for a, b in itertools.pairwise(own)
            ):
                yield own


def pareto(found: Sequence[Found]) -> list[Found]:
    """Those that no other beats in accuracy at no more cost, by rising cost and accuracy."""
    kept: list[Found] = []
    for one in sorted(found, key=lambda one: (one.cost, -one.right, len(one.cascade.steps))):
        if not kept or one.right > kept[-1].right:
            kept.append(one)
    return kept


def _single(entry: Entry, labels: np.ndarray) -> Found:
    step = replace(entry.step, temperature=1.0, weight=1.0, threshold=None)
    share = float(_is_right(entry.probabilities, labels).mean())
    return Found(cascade=Cascade((step,)), cost=entry.cost, right=share)


def _sweep(
    entries: Sequence[Entry], labels: np.ndarray, kind: str, mean: bool, max_cuts: int
) -> list[Found]:
    """The front of one sequence, rule and way of averaging, over all thresholds."""
    steps = [
        replace(entry.step, weight=1 / number if mean else 1.0)
        for number, entry in enumerate(entries, 1)
    ]
    average: np.ndarray | None = None
    is_right, cuts, bins = [], [], []
    for entry, step in zip(entries, steps, strict=True):
        own = at_temperature(entry.probabilities, step.temperature)
        before, average = average, averaged(own, average, step.weight)
        is_right.append(_is_right(average, labels))
        if len(is_right) < len(entries):
            sure = confidence(kind, average, own, before)
            cuts.append(_cuts(sure, max_cuts))
            bins.append(np.searchsorted(cuts[-1][:-1], sure, side="right"))
    n = len(labels)
    dims = tuple(len(own) for own in cuts)
    hits, costs = np.zeros(dims), np.zeros(dims)
    for number, cost in enumerate(costs_of(entries)):
        shape = dims[:number] + (1,) * (len(dims) - number)
        reached, own = bins[:number], is_right[number].astype(float)
        costs += cost * _going_on(np.ones(n), reached, dims).reshape(shape)
        hits += _going_on(own, reached, dims).reshape(shape)
        if number < len(dims):
            shape = dims[: number + 1] + (1,) * (len(dims) - number - 1)
            hits -= _going_on(own, bins[: number + 1], dims).reshape(shape)
    found = []
    for at in _pareto_indices(costs.ravel(), hits.ravel()):
        thresholds = [own[i] for own, i in zip(cuts, np.unravel_index(at, dims), strict=True)]
        early = [
            replace(step, threshold=float(threshold))
            for step, threshold in zip(steps[:-1], thresholds, strict=True)
        ]
        found.append(
            Found(
                cascade=Cascade((*early, steps[-1]), kind),
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


def _cuts(sure: np.ndarray, most: int) -> np.ndarray:
    """Thresholds between different confidences, ascending, the last above all: nobody stops.

    Midpoints, so that rounding on another machine seldom moves a video across.
    """
    values = np.unique(sure.astype(float))
    if len(values) > most:
        values = np.unique(np.quantile(values, np.linspace(0, 1, most)))
    return np.append((values[:-1] + values[1:]) / 2, 2.0)  # confidences are 1 at most


def _pareto_indices(costs: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Where no other entry has more hits at no more cost."""
    order = np.lexsort((-hits, costs))
    most = np.maximum.accumulate(hits[order])
    rises = np.append(True, most[1:] > most[:-1])
    return order[rises]


def _is_right(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the likeliest class is right: bool [n]."""
    return probabilities.argmax(axis=1) == labels
