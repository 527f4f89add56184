"""The CSV file for spreadsheets."""

import csv
import dataclasses
import io
from collections.abc import Mapping
from typing import Any

from fluxvit_jax.token_optimization.latency import Cost
from fluxvit_jax.token_optimization.report.reading import Cell, Report, costs

CELL_COLUMNS = (
    "cell", "method", "budget", "tokens", "frames", "resolution", "head", "gflops", "gflops_kept",
)  # fmt: skip
ACCURACIES = ("videos", "top1", "top1_low", "top1_high", "top5", "top5_low", "top5_high")
COST_FIELDS = [field.name for field in dataclasses.fields(Cost)]
PAIRED = ("top1", "low", "high", "videos")


def text(report: Report) -> str:
    """A row per cell, with two columns per interval and separate columns for each device's costs.

    Device names come last in a column's name: a spreadsheet takes a name that begins with "=" for
    a formula.
    """
    columns = (
        *CELL_COLUMNS,
        *(f"choose_{key}" for key in ACCURACIES),
        *(f"behind_{key}" for key in PAIRED),
        "stopped_after_videos",
        "chosen",
        *(f"report_{key}" for key in ACCURACIES),
        *(f"{kind}_{key}" for kind in ("gain", "over_merge") for key in PAIRED),
        *(f"{key} on {name}" for name in report["devices"] for key in ("batch", *COST_FIELDS)),
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
    for choice in report["chosen"].values():  # plain cells may match larger budgets too
        if choice and choice.get(cell["method"]) == name:
            row["chosen"] = "yes"
            for kind in ("gain", "over_merge") if cell["method"] == "select" else ():
                row |= _flat(kind, choice.get(kind))
    for device, table in report["devices"].items():
        if known := costs(report, device, name):
            known = {"batch": table.get("batch"), **known}
            row |= {f"{key} on {device}": value for key, value in known.items()}
    return row


def _flat(kind: str, accuracy: Mapping[str, Any] | None) -> dict[str, Any]:
    """{"top1": .., "top1_interval": [.., ..]} as {"choose_top1": .., "choose_top1_low": .., ..}."""
    flat: dict[str, Any] = {}
    for key, value in (accuracy or {}).items():
        if key.endswith("interval"):
            ends = [f"{kind}_{key.replace('interval', end)}" for end in ("low", "high")]
            flat |= zip(ends, value, strict=True)
        else:
            flat[f"{kind}_{key}"] = value
    return flat
