"""What a report says: its cells, which of them are best, and what they cost.

A report is that of report.json, but complete: `complete` fills in what a search has yet to find.
"""

import math
from typing import Any

METHODS = {"select": "Token Optimization", "plain": "plain", "merge": "token merging"}
SHORT = {"select": "TO", "plain": "plain", "merge": "merging"}

Report = dict[str, Any]
Cell = dict[str, Any]

UNKNOWN = {
    **{"network": "?", "checkpoint": "?", "dtype": "?", "views": "?"},
    **{"budgets": [], "frames": [], "resolutions": [], "notes": [], "skipped": []},
    **{"cells": {}, "chosen": {}, "devices": {}, "choose": {}, "report": {}},
}


def complete(report: Report) -> Report:
    """A report with all its parts, in an order that does not depend on how the search went."""
    known = UNKNOWN | {key: value for key, value in report.items() if value is not None}

    def place(name: str) -> tuple[int, ...]:
        cell = known["cells"][name]
        own = (cell[key] for key in ("frames", "resolution", "head"))
        return (list(METHODS).index(cell["method"]), -cell["budget"], *own)

    cells = {name: known["cells"][name] for name in sorted(known["cells"], key=place)}
    for many, one in (("frames", "frames"), ("resolutions", "resolution")):
        known[many] = sorted({*known[many], *(cell[one] for cell in cells.values())})
    return known | {"cells": cells}


def measured(report: Report) -> dict[str, Cell]:
    """The cells that have seen the choosing split, the best last: by videos, then accuracy.

    Of equals the cheapest is best, as the search itself has it.
    """

    def rank(name: str) -> tuple[float, ...]:
        cell = report["cells"][name]
        own = cell["choose"]
        return own["videos"], own["top1"], -(cell.get("gflops") or math.inf)

    names = [name for name, cell in report["cells"].items() if cell.get("choose")]
    return {name: report["cells"][name] for name in sorted(names, key=rank)}


def whole(report: Report) -> dict[str, Cell]:
    """Those of `measured` that have seen all videos, and so may be called best."""
    found = measured(report)
    most = max((cell["choose"]["videos"] for cell in found.values()), default=0)
    return {name: cell for name, cell in found.items() if cell["choose"]["videos"] == most}


def choice(report: Report, budget: int) -> dict[str, Any]:
    """What was chosen at a budget: as in report.json, or the best so far of each method."""
    if is_chosen(report, budget):
        return report["chosen"][str(budget)]
    best = whole(report).items()
    return {cell["method"]: name for name, cell in best if cell["budget"] == budget}


def is_chosen(report: Report, budget: int) -> bool:
    """Whether the search has chosen a cell at a budget."""
    own = report["chosen"].get(str(budget)) or {}
    return any(own.get(method) for method in METHODS)


def costs(report: Report, device: str, name: str) -> dict[str, float]:
    """What a cell costs on a device; empty if that is not known."""
    return report["devices"][device].get("cells", {}).get(name, {})
