"""Budgets by content: how much of a video moves decides its cell, before any block runs.

The score of a video is the mean frame difference of its patches, the selector's own measure, on one
small grid (`motion_scores`). A rule has cells and thresholds between them, which a search fits on
the choosing split. NumPy only, as servers import it.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fluxvit_jax.adaptive.cascade import Size, Step
from fluxvit_jax.adaptive.fitting import credit, cuts_between, pareto
from fluxvit_jax.errors import UserError

MAX_CUTS = 32  # thresholds tried: between any two scores up to so many, then quantiles


@dataclass(frozen=True, slots=True)
class MotionRule:
    """Which cell a video is asked by, from its score.

    steps: the cells, the cheapest first; thresholds: scores between them, ascending; rising:
    whether more motion asks for the dearer cell, else less does; grid: that scores are taken on.
    """

    steps: tuple[Step, ...]
    thresholds: tuple[float, ...]
    rising: bool
    grid: Size

    def __str__(self) -> str:
        order = "more" if self.rising else "less"
        return f"the {order} motion, the later of: {'; '.join(map(str, self.steps))}"

    def route(self, scores: np.ndarray) -> np.ndarray:
        """The number of the cell of each score: int [n]."""
        cells = np.searchsorted(self.thresholds, scores, side="right")
        return cells if self.rising else len(self.steps) - 1 - cells

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": [asdict(step) for step in self.steps],
            "thresholds": list(self.thresholds),
            "rising": self.rising,
            "grid": list(self.grid),
        }


def from_json(own: Mapping[str, Any]) -> MotionRule:
    """The rule of `MotionRule.to_json`. Raises UserError: it is damaged."""
    try:
        frames, resolution = own["grid"]
        return MotionRule(
            tuple(Step(**step) for step in own["steps"]),
            tuple(own["thresholds"]),
            bool(own["rising"]),
            (frames, resolution),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"a rule of motion in the report is damaged: {error!r}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRule:
    """A rule of a front, its mean cost of a video, and its accuracy or what it is credited with."""

    rule: MotionRule
    cost: float
    right: float

    @property
    def steps(self) -> Sequence[Step]:
        return self.rule.steps


def front(
    steps: Sequence[Step],
    costs: Sequence[float],
    right: Sequence[np.ndarray],
    scores: np.ndarray,
    grid: Size,
    max_cells: int = 3,
) -> list[FoundRule]:
    """The Pareto front of rules by mean cost and accuracy, the cheapest first.

    costs: of a video by each cell, with the score's own; right: bool [n] by cell; scores: [n].
    """
    cuts = cuts_between(scores, MAX_CUTS)
    bins = np.searchsorted(cuts, scores, side="right")  # 0 .. len(cuts)
    order = sorted(range(len(steps)), key=lambda i: costs[i])
    found: list[FoundRule] = []
    for count in range(2, max_cells + 1):
        for cells in itertools.combinations(order, count):
            for rising in (True, False):
                found += _sweep([*cells], steps, costs, right, cuts, bins, rising, grid)
        found = pareto(found)
    return found


def credited(
    found: Sequence[FoundRule],
    steps: Sequence[Step],
    right: Sequence[np.ndarray],
    scores: np.ndarray,
) -> list[FoundRule]:
    """The front of a front by what each rule is credited with: see `fitting.credited`.

    found: of `front`, for these steps, right answers and scores.
    """

    def less_flattery(one: FoundRule) -> FoundRule:
        cells = np.stack([right[steps.index(step)] for step in one.rule.steps])
        answers = cells[one.rule.route(scores), np.arange(len(scores))]
        return replace(one, right=credit(answers, right))

    return pareto(map(less_flattery, found))


def _sweep(
    cells: Sequence[int],
    steps: Sequence[Step],
    costs: Sequence[float],
    right: Sequence[np.ndarray],
    cuts: np.ndarray,
    bins: np.ndarray,
    rising: bool,
    grid: Size,
) -> list[FoundRule]:
    """The rules of some cells at all thresholds, where they have the most right for their cost."""
    n, by_score = len(bins), list(cells) if rising else list(cells)[::-1]
    # hits[k][j]: right answers of the k-th cell by score among the videos of the first j bins.
    hits = [_cumulative(right[cell].astype(float), bins, len(cuts)) for cell in by_score]
    videos = _cumulative(np.ones(n), bins, len(cuts))
    best: dict[float, FoundRule] = {}
    for ends in itertools.combinations(range(1, len(cuts) + 1), len(cells) - 1):
        edges = [0, *ends, len(cuts) + 1]
        hit = sum(
            own[b] - own[a] for own, (a, b) in zip(hits, itertools.pairwise(edges), strict=True)
        )
        cost = sum(
            costs[cell] * (videos[b] - videos[a])
            for cell, (a, b) in zip(by_score, itertools.pairwise(edges), strict=True)
        )
        rule = MotionRule(
            tuple(steps[cell] for cell in cells),
            tuple(float(cuts[end - 1]) for end in ends),
            rising,
            grid,
        )
        one = FoundRule(rule=rule, cost=float(cost) / n, right=float(hit) / n)
        if one.cost not in best or best[one.cost].right < one.right:
            best[one.cost] = one
    return pareto(best.values())


def _cumulative(values: np.ndarray, bins: np.ndarray, cuts: int) -> np.ndarray:
    """Sums of values over the first j of `cuts` + 1 bins, for j = 0 .. cuts + 1."""
    return np.append(0, np.bincount(bins, values, minlength=cuts + 1).cumsum())
