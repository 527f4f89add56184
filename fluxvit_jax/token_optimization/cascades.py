"""The cascades of a search: found in the probabilities that its cells gave, without another pass.

Single cells on the Pareto front of accuracy and GFLOPs, and those that were chosen for a budget,
are the steps that cascades may have. Temperatures, thresholds, rules and order are all chosen on
the choosing split; the reporting split tells how good they are.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fluxvit_jax.adaptive import fitting, motion
from fluxvit_jax.adaptive.cascade import Answers, Cascade, Step
from fluxvit_jax.adaptive.fitting import Entry, Found
from fluxvit_jax.adaptive.motion import MotionRule
from fluxvit_jax.evaluation.calibration import fit_temperature
from fluxvit_jax.grids import Grid
from fluxvit_jax.reports.confidence_intervals import paired_difference, share_interval
from fluxvit_jax.token_optimization.candidates import Candidate
from fluxvit_jax.token_optimization.results_log import CHOOSE, REPORT

MOST = 40  # cascades in a report
MOST_CELLS = 10  # that their steps are of


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What cells say of the readable videos of a split.

    probabilities: by cell, float32 [n, view counts, C]; labels: int [n]; failed: number of videos
    that could not be read, which count as wrong.
    """

    probabilities: Mapping[str, np.ndarray]
    labels: np.ndarray
    failed: int

    @property
    def videos(self) -> int:
        return len(self.labels) + self.failed

    def answers(self, cascade: Cascade, view_counts: Sequence[int]) -> Answers:
        """What a cascade says of the readable videos, by what its cells said."""

        def ask(number: int, videos: np.ndarray) -> np.ndarray:
            step = cascade.steps[number]
            at = view_counts.index(step.views) if step.views else -1
            return self.probabilities[step.cell][videos, at]

        return cascade.run(len(self.labels), ask)


def members(
    candidates: Sequence[Candidate],
    top1: Mapping[str, float],
    gflops: Mapping[str, float],
    chosen: Collection[str],
) -> list[Candidate]:
    """The cells that cascades are made of, at most `MOST_CELLS`, by rising cost.

    candidates: those measured on all videos, without merging; top1: on the choosing split; chosen:
    names of those that a budget chose.
    """
    ordered = sorted(candidates, key=lambda c: (gflops[c.name], -top1[c.name], c.name))
    wanted, most = [], -1.0
    for candidate in ordered:
        name = candidate.name
        if top1[name] > most or (name in chosen and candidate.method == "select"):
            wanted.append(candidate)
        most = max(most, top1[name])
    return _spread(wanted, MOST_CELLS)


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def find(
    cells: Sequence[Candidate],
    table: Table,
    view_counts: Sequence[int],
    costs: Mapping[str, tuple[float, float]],
    max_steps: int,
) -> list[Found]:
    """The front of cascades of cells on the choosing split, at most `MOST`, by rising cost.

    By what they are credited with, so that a hardly better one gives way to a single cell: see
    `fitting.credited`.

    Of more, the best within each of `MOST` costs that rise by equal factors.

    table: of that split; costs: GFLOPs of one view at each cell, and their part that ranks patches.
    """
    entries = [
        Entry(
            step=replace(
                _step_of(cell),
                views=0 if views == view_counts[-1] else views,
                temperature=fit_temperature(table.probabilities[cell.name][:, at], table.labels),
            ),
            probabilities=table.probabilities[cell.name][:, at],
            cost=views * costs[cell.name][0],
            shared=views * costs[cell.name][1],
        )
        for cell in cells
        for at, views in enumerate(view_counts)
    ]
    front = fitting.front(entries, table.labels, max_steps)
    found = fitting.credited(front, entries, table.labels)
    within = np.geomspace(found[0].cost, found[-1].cost, MOST) * (1 + 1e-9)
    best = np.searchsorted([one.cost for one in found], within, side="right") - 1
    return [found[i] for i in np.unique(best)]


def describe_all(
    cells: Sequence[Candidate],
    tables: Mapping[str, Table],
    view_counts: Sequence[int],
    costs: Mapping[str, tuple[float, float]],
    max_steps: int,
) -> dict[str, Any]:
    """The cascades of a report by name, by rising GFLOPs.

    {"confidence", "steps", "gflops", "choose", "report", "over", "stopped_by_class"}: see
    `Cascade.to_json`, `step_costs`, `describe`, `gain_over` and `stopped_by_class`, the last two on
    the reporting split. "choose" has "credited" as well, by which plans compare.

    tables: of both splits; costs: as in `find`.
    """
    choosing, reporting = tables[CHOOSE], tables[REPORT]
    singles = {
        cell.name: (
            view_counts[-1] * costs[cell.name][0],
            float(
                (choosing.probabilities[cell.name][:, -1].argmax(axis=1) == choosing.labels).mean()
            ),
        )
        for cell in cells
    }
    described = {}
    for number, one in enumerate(find(cells, choosing, view_counts, costs, max_steps), 1):
        cascade, work = one.cascade, step_costs(one.cascade, costs, view_counts[-1])
        answers = reporting.answers(cascade, view_counts)
        on_choosing = describe(choosing.answers(cascade, view_counts), choosing, work)
        most = on_choosing["average_gflops"] * (1 + 1e-9)
        within = {name: right for name, (cost, right) in singles.items() if cost <= most}
        best = max(within, key=lambda name: within[name], default=None)
        described[f"cascade-{number:02d}"] = cascade.to_json() | {
            "gflops": work,
            CHOOSE: on_choosing | {"credited": _of_all(one.right, choosing)},
            REPORT: describe(answers, reporting, work),
            "over": best and gain_over(best, answers, reporting),
            "stopped_by_class": stopped_by_class(answers, reporting, len(cascade.steps)),
        }
    return described


def describe_motion(
    cells: Sequence[Candidate],
    tables: Mapping[str, Table],
    scores: Mapping[str, np.ndarray],
    grid: Grid,
    views: int,
    costs: Mapping[str, tuple[float, float]],
) -> dict[str, Any]:
    """The rules of motion of a report by name, by rising GFLOPs: see `MotionRule.to_json`.

    Each with "choose" and "report": {"videos", "top1", "top1_interval", "average_gflops", "shares"
    of the videos that each cell is asked}, and "credited" of "choose". All views of a video count.

    scores: of the readable videos of both splits, on `grid`; costs: as in `find`.
    """
    steps = [_step_of(cell) for cell in cells]
    # A cell on the grid of the scores ranks patches by the very embeddings that they are made of.
    per_patch = costs[cells[0].name][1] / cells[0].grid.tokens
    dear = [
        views * costs[cell.name][0] + (0.0 if cell.grid == grid else per_patch * grid.tokens)
        for cell in cells
    ]
    right = {
        name: [own.probabilities[c.name][:, -1].argmax(axis=1) == own.labels for c in cells]
        for name, own in tables.items()
    }
    size = grid.frames, grid.resolution
    front = motion.front(steps, dear, right[CHOOSE], scores[CHOOSE], size)
    found = motion.credited(front, steps, right[CHOOSE], scores[CHOOSE])
    described = {}
    for number, one in enumerate(_spread(found, MOST), 1):
        own = [steps.index(step) for step in one.rule.steps]
        described[f"motion-{number:02d}"] = one.rule.to_json() | {
            name: _describe_rule(one.rule, own, right[name], scores[name], dear, tables[name])
            for name in (CHOOSE, REPORT)
        }
        described[f"motion-{number:02d}"][CHOOSE]["credited"] = _of_all(one.right, tables[CHOOSE])
    return described


def _of_all(right: float, table: Table) -> float:
    """A share of the readable videos as one of all, those that failed being wrong."""
    return right * len(table.labels) / table.videos


def _describe_rule(
    rule: MotionRule,
    cells: Sequence[int],
    right: Sequence[np.ndarray],
    scores: np.ndarray,
    costs: Sequence[float],
    table: Table,
) -> dict[str, Any]:
    """A rule on a split; cells: the numbers of its cells among those of `right` and `costs`."""
    routed = rule.route(scores)
    hits = sum(int(right[cell][routed == n].sum()) for n, cell in enumerate(cells))
    shares = [float((routed == n).mean()) for n in range(len(cells))]
    return {
        "videos": table.videos,
        "top1": hits / table.videos,
        "top1_interval": share_interval(hits, table.videos),
        "average_gflops": float(np.dot(shares, [costs[cell] for cell in cells])),
        "shares": shares,
    }


def _step_of(cell: Candidate) -> Step:
    """A cell as a step, all views of a video."""
    return Step(
        budget=cell.budget,
        frames=cell.grid.frames,
        resolution=cell.grid.resolution,
        head=cell.head,
        cell=cell.name,
    )


def describe(answers: Answers, table: Table, work: Sequence[float]) -> dict[str, Any]:
    """A cascade on a split: {"videos", "top1", "top1_interval", "average_gflops", "reached"}.

    "reached": the share of the readable videos that reach each step. work: from `step_costs`.
    """
    right = int((answers.probabilities.argmax(axis=1) == table.labels).sum())
    reached = [float((answers.step >= number).mean()) for number in range(len(work))]
    return {
        "videos": table.videos,
        "top1": right / table.videos,
        "top1_interval": share_interval(right, table.videos),
        "average_gflops": sum(share * cost for share, cost in zip(reached, work, strict=True)),
        "reached": reached,
    }


def step_costs(
    cascade: Cascade, costs: Mapping[str, tuple[float, float]], all_views: int
) -> list[float]:
    """What each step costs a video that reaches it; costs: as in `find`."""
    nothing = np.zeros((0, 1), np.float32)
    entries = []
    for step in cascade.steps:
        cost, shared = (one * (step.views or all_views) for one in costs[step.cell])
        entries.append(Entry(step=step, probabilities=nothing, cost=cost, shared=shared))
    return fitting.costs_of(entries)


def stopped_by_class(answers: Answers, table: Table, steps: int) -> dict[str, list[int]]:
    """How many videos of each class stop at each step, by the number of the class as text."""
    return {
        str(label): np.bincount(answers.step[table.labels == label], minlength=steps).tolist()
        for label in np.unique(table.labels)
    }


def gain_over(cell: str, answers: Answers, table: Table) -> dict[str, Any]:
    """By how much a cascade is more accurate than a cell with all views, paired over the videos."""
    right = [
        own.argmax(axis=1) == table.labels
        for own in (answers.probabilities, table.probabilities[cell][:, -1])
    ]
    wrong = np.zeros(table.failed, bool)
    mean, interval = paired_difference(*(np.append(own, wrong) for own in right))
    return {"cell": cell, "top1": mean, "interval": interval, "videos": table.videos}
