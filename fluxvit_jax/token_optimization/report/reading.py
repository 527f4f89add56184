"""The content of a report: its cells, the best of them, and their costs.

Reports here are those of report.json after `complete`, which fills in what a search does not know
yet.
"""

import math
from typing import Any

import numpy as np

from fluxvit_jax.adaptive import cascade as cascades

METHODS = {"select": "Token Optimization", "plain": "plain", "merge": "token merging"}
SHORT = {"select": "TO", "plain": "plain", "merge": "merging"}

Report = dict[str, Any]
Cell = dict[str, Any]

UNKNOWN: Report = {
    "network": "?",
    "checkpoint": "?",
    "dtype": "?",
    "views": "?",
    "budgets": [],
    "frames": [],
    "resolutions": [],
    "notes": [],
    "skipped": [],
    "cells": {},
    "chosen": {},
    "devices": {},
    "cascades": {},
    "choose": {},
    "report": {},
}


def complete(report: Report) -> Report:
    """A report with all its parts, in an order that does not depend on how the search went."""
    known = UNKNOWN | {key: value for key, value in report.items() if value is not None}

    def order(name: str) -> tuple[int, ...]:
        cell = known["cells"][name]
        size = cell["frames"], cell["resolution"], cell["head"]
        return list(METHODS).index(cell["method"]), -cell["budget"], *size

    cells = {name: known["cells"][name] for name in sorted(known["cells"], key=order)}
    frames = {*known["frames"], *(cell["frames"] for cell in cells.values())}
    resolutions = {*known["resolutions"], *(cell["resolution"] for cell in cells.values())}
    return known | {
        "cells": cells,
        "frames": sorted(frames),
        "resolutions": sorted(resolutions),
    }


def measured_cells(report: Report) -> dict[str, Cell]:
    """The cells evaluated on the choosing split, the best last: by videos, then accuracy.

    Ties go to the cheapest, as in the search itself.
    """

    def rank(name: str) -> tuple[float, ...]:
        cell = report["cells"][name]
        choose = cell["choose"]
        return choose["videos"], choose["top1"], -(cell.get("gflops") or math.inf)

    names = [name for name, cell in report["cells"].items() if cell.get("choose")]
    return {name: report["cells"][name] for name in sorted(names, key=rank)}


def complete_cells(report: Report) -> dict[str, Cell]:
    """The `measured_cells` that were evaluated on all videos: only these may be called best."""
    measured = measured_cells(report)
    most = max((cell["choose"]["videos"] for cell in measured.values()), default=0)
    return {name: cell for name, cell in measured.items() if cell["choose"]["videos"] == most}


def choice(report: Report, budget: int) -> dict[str, Any]:
    """The choice at a budget: as in report.json, or the best cell so far of each method."""
    if is_chosen(report, budget):
        return report["chosen"][str(budget)]
    best = complete_cells(report).items()
    return {cell["method"]: name for name, cell in best if cell["budget"] == budget}


def is_chosen(report: Report, budget: int) -> bool:
    """Whether the search has chosen a cell at a budget."""
    chosen = report["chosen"].get(str(budget)) or {}
    return any(chosen.get(method) for method in METHODS)


def costs(report: Report, device: str, name: str) -> dict[str, float]:
    """The costs of a cell on a device; empty if they are not known."""
    return report["devices"][device].get("cells", {}).get(name, {})


def cascade_milliseconds(report: Report, own: dict[str, Any], device: str) -> float | None:
    """The mean time of a video by a cascade; None where a cell of it was not timed."""
    cascade = cascades.from_json(own, "the report")
    known = [costs(report, device, step.cell) for step in cascade.steps]
    if not all("milliseconds" in one for one in known):
        return None
    times = [one["milliseconds"] for one in known]
    added = cascade.added_views(report.get("view_count", 1))
    return float(np.dot(own["choose"]["reached"], np.multiply(times, added)))


def grid(cell: Cell) -> str:
    return f"{cell['frames']}x{cell['resolution']}"
