"""The file for spreadsheets."""

import csv
import io
from collections.abc import Mapping
from typing import Any

from fluxvit_jax.costs import Cost
from fluxvit_jax.report.reading import Cell, Report, costs

ACCURACIES = ("videos", "top1", "top1_low", "top1_high", "top5", "top5_low", "top5_high")
PAIRED = ("top1", "low", "high", "videos")


def text(report: Report) -> str:
    """A row a cell, intervals in two columns, and the costs of each device in columns of its own.

    Devices are named at the end of a column's name: at the beginning, one that is called "=..."
    would be a formula.
    """
    columns = (
        *("cell", "method", "budget", "tokens", "frames", "resolution", "head"),
        *("gflops", "gflops_kept"),
        *(f"choose_{key}" for key in ACCURACIES),
        *(f"behind_{key}" for key in PAIRED),
        *("stopped_after_videos", "chosen"),
        *(f"report_{key}" for key in ACCURACIES),
        *(f"{kind}_{key}" for kind in ("gain", "over_merge") for key in PAIRED),
        *(f"{key} on {name}" for name in report["devices"] for key in ("batch", *Cost._fields)),
    )
    stopped = {one["cell"]: one["videos"] for one in report["skipped"]}
    rows = [
        _row(report, name, cell) | {"stopped_after_videos": stopped.get(name)}
        for name, cell in report["cells"].items()
    ]
    content = io.StringIO(newline="")
    writer = csv.DictWriter(content, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return content.getvalue()


def _row(report: Report, name: str, cell: Cell) -> dict[str, Any]:
    row = {"cell": name, **cell}
    for kind in ("choose", "report", "behind"):
        row |= _flat(kind, cell.get(kind))
    for choice in report["chosen"].values():  # plain cells may stand for larger budgets
        if choice and choice.get(cell["method"]) == name:
            row["chosen"] = "yes"
            for kind in ("gain", "over_merge") if cell["method"] == "select" else ():
                row |= _flat(kind, choice.get(kind))
    for device, table in report["devices"].items():
        if own := costs(report, device, name):
            own = {"batch": table.get("batch"), **own}
            row |= {f"{key} on {device}": value for key, value in own.items()}
    return row


def _flat(kind: str, own: Mapping[str, Any] | None) -> dict[str, Any]:
    """{"top1": .., "top1_interval": [.., ..]} as {"choose_top1": .., "choose_top1_low": .., ..}."""
    flat = {}
    for key, value in (own or {}).items():
        if key.endswith("interval"):
            ends = [f"{kind}_{key.replace('interval', end)}" for end in ("low", "high")]
            flat |= zip(ends, value, strict=True)
        else:
            flat[f"{kind}_{key}"] = value
    return flat
