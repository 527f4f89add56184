"""The lists below the page's sections: the cells that halving stopped, and all cells."""

import html

from fluxvit_jax.reports.elements import folded, row, table
from fluxvit_jax.reports.wording import count, interval, number, percent, points
from fluxvit_jax.token_optimization.report.reading import Cell, Report, costs
from fluxvit_jax.token_optimization.report.style import mark

SPLIT = "Videos", "Top-1 (95 % interval)", "Top-5 (95 % interval)"
BEHIND = "Behind the best, points"
COSTS = {  # heads of columns by names in the report
    "milliseconds": "ms",
    "milliseconds_p95": "95 % below",
    "batch_milliseconds": "ms a batch",
    "batch_milliseconds_p95": "95 % below",
    "clips_per_second": "Clips a second",
    "peak_memory_mb": "Memory, MB",
    "compile_seconds": "Compiling, s",
}


def stopped(report: Report) -> str:
    """The cells that halving stopped."""
    rows = []
    for skipped in report["skipped"]:
        name = skipped["cell"]
        cell = report["cells"].get(name, {})
        columns = f"{skipped['videos']:,}", _share(cell, "choose", "top1"), _behind(cell)
        rows.append(row(html.escape(name), columns))
    heads = "Cell", "After videos", "Top-1 on these", BEHIND
    title = f"{count(len(rows), 'cell')} stopped early by halving"
    return folded(title, table("all", heads, rows)) if rows else ""


def everything(report: Report) -> str:
    """All numbers of every cell."""
    groups = [
        ("Cell", ("Name", "Tokens")),
        ("Choosing split", (*SPLIT, BEHIND)),
        ("Reporting split", SPLIT),
        ("GFLOPs", ("All", "Kept")),
        *((_device(report, device), COSTS.values()) for device in report["devices"]),
    ]
    above = "".join(
        f'<th scope="colgroup" colspan="{len(names)}">{html.escape(group)}</th>'
        for group, names in groups
    )
    heads = [name for _, names in groups for name in names]
    rows = [_row(report, name, cell) for name, cell in report["cells"].items()]
    content = table("all", heads, rows, f"<tr>{above}</tr>\n")
    return folded(f"All {count(len(rows), 'cell')}", content) if rows else ""


def _device(report: Report, device: str) -> str:
    batch = report["devices"][device].get("batch")
    return device if batch is None else f"{device}, batches of {batch}"


def _row(report: Report, name: str, cell: Cell) -> str:
    columns = [_integer(cell.get("tokens"))]
    columns += [*_split(cell, "choose"), _behind(cell), *_split(cell, "report")]
    columns += [number(cell.get(key)) for key in ("gflops", "gflops_kept")]
    for device in report["devices"]:
        known = costs(report, device, name)
        columns += [number(known.get(key)) for key in COSTS]
    return row(mark(cell["method"]) + html.escape(name), columns)


def _split(cell: Cell, split: str) -> tuple[str, ...]:
    videos = (cell.get(split) or {}).get("videos")
    return _integer(videos), _share(cell, split, "top1"), _share(cell, split, "top5")


def _integer(value: int | None) -> str:
    return "&ndash;" if value is None else f"{value:,}"


def _share(cell: Cell, split: str, top: str) -> str:
    """An accuracy with its interval."""
    accuracy = cell.get(split) or {}
    if top not in accuracy:
        return "&ndash;"
    ends = accuracy.get(f"{top}_interval")
    return percent(accuracy[top]) + (f" ({interval(ends)})" if ends else "")


def _behind(cell: Cell) -> str:
    behind = cell.get("behind")
    if not behind:
        return "&ndash;"
    top1, low, high = (points(value, "") for value in (behind["top1"], *behind["interval"]))
    return f"{top1} ({low} to {high})"
