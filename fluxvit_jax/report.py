"""What a search for the best way to spend tokens found, as JSON, CSV, a page and a picture.

A *cell* is one way to run the network: a method, a budget, a grid (frames x resolution) and a head.
"select" keeps `budget` tokens of a grid that has more, "plain" runs a grid that has just as many,
"merge" lets all tokens in and merges them on the way. Halving stops cells that fall behind after
fewer videos. Their accuracies are of those videos only, so that they are drawn but never called
best.
"""

import base64
import csv
import html
import io
import json
import math
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fluxvit_jax import page
from fluxvit_jax.budgets import PATCH
from fluxvit_jax.errors import UserError

if TYPE_CHECKING:  # importing matplotlib takes a second, which only those who draw should spend
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHODS = {"select": "Token Optimization", "plain": "plain", "merge": "token merging"}
SHORT = {"select": "TO", "plain": "plain", "merge": "merging"}
MARKERS = {"select": "o", "plain": "s", "merge": "^"}  # of matplotlib; `SHAPES` are the same in SVG
SHAPES = {
    "select": '<circle r="5"/>',
    "plain": '<path d="M-4.5-4.5h9v9h-9z"/>',
    "merge": '<path d="M0-5.5 5.5 4.5h-11z"/>',
}

# Blue, orange and green that people with any colour vision tell apart (after Okabe and Ito).
LIGHT = page.LIGHT | {"plain": "#c9540a", "merge": "#0b8a68", "warn": "#a66300"}
DARK = page.DARK | {"plain": "#ff9d5c", "merge": "#3fcfa4", "warn": "#f0b429"}
# Percent of the accent in the worst and in the best cell of a heat map: text is legible on both.
HEAT = 8, 55

LOG_FROM = 4  # axes are logarithmic from this ratio of their ends
WIDE, NARROW = (600, 372), (380, 330)  # pixels of a chart
THREE_WIDE = (440, 340)  # where three charts share a row
NAME = 48  # points that the name of a grid is wide, 24x336 being among the longest
# Cells of one budget have as many tokens: in points, how far from there their methods are drawn.
ASIDE = {"select": -6, "plain": 0, "merge": 6}
COLUMNS = 4  # of the picture
LEGIBLE = 14  # most frames or resolutions of a heat map in the picture

ACCURACIES = ("videos", "top1", "top1_low", "top1_high", "top5", "top5_low", "top5_high")
PAIRED = ("top1", "low", "high", "videos")
COSTS = (
    *("milliseconds", "milliseconds_p95", "batch_milliseconds", "batch_milliseconds_p95"),
    *("clips_per_second", "peak_memory_mb", "compile_seconds"),
)

STYLE = """
body { font-size: 0.9375rem; }
main, header { max-width: 88rem; margin: 0 auto; }
section, details { margin-top: 2rem; }
h2 { font-size: 1.25rem; line-height: 1.3; }
h3 { font-size: 0.9375rem; line-height: 1.35; margin-bottom: 0.5rem; }
ul { list-style: none; }
.legend { color: var(--quiet); font-size: 0.875rem; max-width: 52rem; margin: 0.25rem 0 0.875rem; }
.legend b { color: var(--ink); }
.small, .legend { text-wrap: pretty; }
.small { display: block; color: var(--quiet); font-size: 0.8125rem; font-weight: 400; }
.card, details {
  background: var(--card); border: 1px solid var(--line); border-radius: 0.75rem; padding: 1rem;
}
.facts {
  display: grid; gap: 0.75rem 1.5rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr));
}
dt { color: var(--quiet); font-size: 0.8125rem; }
dd { font-weight: 600; }
.notes {
  margin-top: 1rem; padding: 0.75rem 1rem; border-radius: 0.75rem; display: grid; gap: 0.35rem;
  border: 1px solid var(--warn); border-left-width: 0.375rem;
  background: color-mix(in srgb, var(--warn) 9%, var(--card)); font-weight: 500;
}
.tag {
  display: inline-block; padding: 0 0.4rem; border-radius: 0.5rem; white-space: nowrap;
  color: var(--warn); border: 1px solid currentColor; font-size: 0.75rem; font-weight: 500;
}
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; }
thead th { color: var(--quiet); font-size: 0.8125rem; vertical-align: bottom; }
.rows td, .rows th { padding: 0.6rem 1rem 0.6rem 0; vertical-align: top; }
.rows tbody tr { border-top: 1px solid var(--line); }
.rows thead th { padding-top: 0; }
.costs, .all { width: auto; }
.costs td, .costs tbody th { padding: 0.35rem 0; }
.costs td, .costs th, .costs tbody th { padding-right: clamp(0.6rem, 4vw, 4rem); }
.costs td, .costs .small { white-space: nowrap; }
.costs tr.again { border-top-color: transparent; }
.costs tr.again th { color: transparent; }
.value { font-size: 1.125rem; font-weight: 650; white-space: nowrap; }
.budget { font-size: 1.125rem; font-weight: 700; white-space: nowrap; }
.better { color: var(--accent); }
.worse { color: var(--plain); }
.mark { width: 0.75em; height: 0.75em; margin-right: 0.4em; overflow: visible; fill: currentColor; }
.mark.hollow { fill: none; stroke: currentColor; stroke-width: 1.5; }
.select { color: var(--accent); }
.plain { color: var(--plain); }
.merge { color: var(--merge); }
.whisker {
  position: relative; height: 0.75rem; max-width: 9rem; margin: 0.2rem 0;
  background: linear-gradient(var(--quiet), var(--quiet)) 50% / 1px 100% no-repeat;
}
.whisker div {
  position: absolute; top: 50%; height: 2px; margin-top: -1px; background: currentColor;
}
.whisker div + div {
  width: 0.5rem; height: 0.5rem; margin: -0.25rem; border-radius: 50%;
}
.keys { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin-bottom: 0.875rem; }
.keys span { white-space: nowrap; }
.keys .line { width: 1.5rem; height: 0.75em; margin-right: 0.4em; stroke: var(--quiet); }
.keys .line { stroke-width: 1.5; fill: var(--quiet); }
/* As many beside each other as fit, at most `--columns`. */
.panels {
  display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(
    max(min(100%, 22rem), (100% - (var(--columns) - 1) * 1rem) / var(--columns)), 1fr));
}
.panels > * { min-width: 0; }
img { display: block; width: 100%; height: auto; }
.heat { table-layout: fixed; font-size: clamp(0.6875rem, 2.6vw, 0.8125rem); }
.heat th, .heat td { text-align: center; padding: 0.3rem 0; border: 2px solid var(--card); }
.heat th { color: var(--quiet); font-size: inherit; font-weight: 400; }
.heat td { border-radius: 0.375rem; }
.heat .known {
  background: color-mix(in srgb, var(--accent) var(--heat), var(--card));
}
.heat .partial { color: var(--quiet); font-style: italic; background: none; }
.heat .best { outline: 2px solid var(--ink); outline-offset: -2px; font-weight: 700; }
summary { cursor: pointer; font-weight: 600; }
details .scroll { margin-top: 0.75rem; }
.scroll, .sideways { overflow: auto; overflow-wrap: normal; }
.scroll { max-height: 36rem; }
.sideways { width: fit-content; max-width: 100%; }
.all { font-size: 0.8125rem; white-space: nowrap; }
.all th, .all td { padding: 0.25rem 1.25rem 0.25rem 0; }
.all td { text-align: right; }
.all thead { position: sticky; top: 0; background: var(--card); }
.all thead th { text-align: right; }
.all thead tr:first-child th { color: var(--ink); text-align: left; }
.all th:first-child, .all tbody th { text-align: left; }
.all tbody tr { border-top: 1px solid var(--line); }
@media (max-width: 48rem) {
  .stacked thead { display: none; }
  .stacked tr {
    display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0.625rem 1rem;
    padding: 0.75rem 0;
  }
  .stacked tbody tr:first-child { border-top: 0; }
  .stacked td, .stacked tbody th { display: block; padding: 0; }
  .stacked tbody th { grid-column: 1 / -1; }
  .stacked td::before {
    content: attr(data-label); display: block; color: var(--quiet); font-size: 0.8125rem;
  }
  .stacked .gain:nth-child(4) { grid-column: 1 / -1; }
  .costs { font-size: 0.875rem; }
  .costs th, .costs .small { font-size: 0.75rem; }
  .costs td, .costs th, .costs tbody th { padding-right: 0.5rem; }
}
@media (max-width: 30rem) { .card, details { padding: 0.75rem; } }
"""

Report = dict[str, Any]  # of report.json
Cell = dict[str, Any]


def write(report: Report, folder: Path) -> None:
    """Writes report.json, .csv, .html and .png into `folder`, each whole or not at all.

    What an unfinished search does not know yet may be missing in `report`, or None.

    Raises UserError if the folder cannot be written.
    """
    known = {key: value for key, value in report.items() if value is not None}
    files = {
        "report.json": (json.dumps(report, indent=1) + "\n").encode(),
        "report.csv": _csv(known).encode(),
        "report.html": _html(known).encode(),
        "report.png": _png(known),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            _write_whole(folder / name, content)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _write_whole(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, accuracy) that no other beats, by rising cost.

    One beats another by more accuracy at no more cost, or by less cost at no less accuracy. Equal
    points do not beat each other, and come in their order.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


# What is in a report.


def _cells(report: Report) -> list[tuple[str, Cell]]:
    """Names and cells, in an order that does not depend on how the search went."""
    methods = list(METHODS)

    def order(item: tuple[str, Cell]) -> tuple[int, ...]:
        cell = item[1]
        place = (cell[key] for key in ("frames", "resolution", "head"))
        return (methods.index(cell["method"]), -cell["budget"], *place)

    return sorted(report.get("cells", {}).items(), key=order)


def _most_videos(report: Report) -> int:
    """Videos of the choosing split that the cells which went furthest were measured on."""
    return max((cell["choose"]["videos"] for _, cell in _measured(report)), default=0)


def _measured(report: Report) -> list[tuple[str, Cell]]:
    return [(name, cell) for name, cell in _cells(report) if cell.get("choose")]


def _whole(report: Report) -> list[tuple[str, Cell]]:
    """The cells that were measured on all videos, and so may be called best."""
    most = _most_videos(report)
    return [(name, cell) for name, cell in _measured(report) if cell["choose"]["videos"] == most]


def _choice(report: Report, budget: int) -> dict[str, Any]:
    """What was chosen at a budget: as in report.json, or the best so far of each method."""
    if _is_chosen(report, budget):
        return report["chosen"][str(budget)]
    # Of equals the cheapest, as the search itself would have it.
    ranked = sorted(_whole(report), key=lambda item: (item[1]["choose"]["top1"], -_gflops(item[1])))
    return {cell["method"]: name for name, cell in ranked if cell["budget"] == budget}


def _is_chosen(report: Report, budget: int) -> bool:
    own = report.get("chosen", {}).get(str(budget)) or {}
    return any(own.get(method) for method in METHODS)


def _gflops(cell: Cell) -> float:
    return cell.get("gflops") or math.inf


def _has_merging(report: Report) -> bool:
    return any(cell["method"] == "merge" for _, cell in _cells(report))


def _costs(report: Report, device: str, name: str) -> dict[str, float]:
    return report["devices"][device].get("cells", {}).get(name, {})


def _device_names(report: Report) -> list[str]:
    return list(report.get("devices", {}))


# The file for spreadsheets.


def _csv(report: Report) -> str:
    """A row a cell, intervals in two columns, and the costs of each device in columns of its own.

    Devices are named at the end of a column's name: at the beginning, one that is called "=..."
    would be a formula.
    """
    devices = _device_names(report)
    stopped = {one["cell"]: one["videos"] for one in report.get("skipped", [])}
    rows = [_row(report, name, cell, stopped) for name, cell in _cells(report)]
    columns = (
        *("cell", "method", "budget", "tokens", "frames", "resolution", "head"),
        *("gflops", "gflops_kept"),
        *(f"choose_{key}" for key in ACCURACIES),
        *(f"behind_{key}" for key in PAIRED),
        *("stopped_after_videos", "chosen"),
        *(f"report_{key}" for key in ACCURACIES),
        *(f"{kind}_{key}" for kind in ("gain", "over_merge") for key in PAIRED),
        *(f"{key} on {device}" for device in devices for key in ("batch", *COSTS)),
    )
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _row(report: Report, name: str, cell: Cell, stopped: dict[str, int]) -> dict[str, Any]:
    chosen = report.get("chosen", {}).get(str(cell["budget"])) or {}
    is_chosen = chosen.get(cell["method"]) == name
    row = {"cell": name, "stopped_after_videos": stopped.get(name), **cell}
    row["chosen"] = "yes" if is_chosen else None
    for kind in ("choose", "report", "behind"):
        row |= _flat(kind, cell.get(kind))
    if is_chosen and cell["method"] == "select":
        for kind in ("gain", "over_merge"):
            row |= _flat(kind, chosen.get(kind))
    for device in _device_names(report):
        if costs := _costs(report, device, name):
            row[f"batch on {device}"] = report["devices"][device].get("batch")
            row |= {f"{key} on {device}": value for key, value in costs.items()}
    return row


def _flat(kind: str, own: dict[str, Any] | None) -> dict[str, Any]:
    """{"top1": .., "top1_interval": [.., ..]} as {"choose_top1": .., "choose_top1_low": .., ..}."""
    flat = {}
    for key, value in (own or {}).items():
        if key.endswith("interval"):
            flat |= {f"{kind}_{key.replace('interval', end)}": x for end, x in _ends(value)}
        else:
            flat[f"{kind}_{key}"] = value
    return flat


def _ends(interval: Sequence[float]) -> Iterator[tuple[str, float]]:
    return zip(("low", "high"), interval, strict=True)


# Numbers as they are read.


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _range(interval: Sequence[float] | None) -> str:
    return f"{100 * interval[0]:.1f} to {_percent(interval[1])}" if interval else ""


def _points(difference: float, sign: str = "+") -> str:
    """A difference of two shares in points of a percent."""
    return f"{100 * difference:{sign}z.1f}".replace("-", "&minus;")


def _number(value: float | None) -> str:
    """Three digits, or all before the point."""
    if value is None:
        return "&ndash;"
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{digits}f}"


def _grid(cell: Cell) -> str:
    return f"{cell['frames']}x{cell['resolution']}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


# The page.


def _html(report: Report) -> str:
    network = html.escape(f"FluxViT-{report.get('network', '?')}")
    sections = (_comparison, _prices, _charts, _heat_maps, _skipped, _every_cell)
    body = "".join(section(report) for section in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Token Optimization of {network}</title>
<style>{page.colours(LIGHT, DARK)}{page.BASE}{STYLE}</style>
</head>
<body>
<header>
<h1>Token Optimization of {network}</h1>
{_notes(report)}{_facts(report)}</header>
<main>
{body}</main>
</body>
</html>
"""


def _notes(report: Report) -> str:
    items = "".join(f"<li>{html.escape(note)}</li>\n" for note in report.get("notes", []))
    return f'<ul class="notes">\n{items}</ul>\n' if items else ""


def _facts(report: Report) -> str:
    cells, stopped = len(report.get("cells", {})), len(report.get("skipped", []))
    searched = f"<dd>{_count(cells, 'cell')}</dd>"
    if stopped:
        searched += f'<dd class="small">{stopped:,} stopped early by halving</dd>'
    facts = {
        "Checkpoint": f"<dd>{html.escape(str(report.get('checkpoint', '?')))}</dd>",
        "Views, clips x crops": f"<dd>{html.escape(str(report.get('views', '?')))}</dd>",
        "Searched": searched,
        "Chosen on": _split(report.get("choose")),
        "Reported on": _split(report.get("report")),
    }
    items = "".join(f"<div><dt>{name}</dt>{fact}</div>\n" for name, fact in facts.items())
    return f'<dl class="facts card">\n{items}</dl>\n'


def _split(split: dict[str, Any] | None) -> str:
    if not split:
        return "<dd>not yet</dd>"
    videos = _count(split.get("videos", 0), "video")
    failed = split.get("failed", 0)
    failures = f", {failed:,} of them failed and count as wrong" if failed else ", none failed"
    return (
        f"<dd>{html.escape(str(split.get('data', '?')))}</dd>"
        f'<dd class="small">{videos}{failures}</dd>'
    )


def _mark(method: str, hollow: bool = False) -> str:
    kind = f"mark {method}{' hollow' if hollow else ''}"
    return f'<svg class="{kind}" viewBox="-6 -6 12 12" aria-hidden="true">{SHAPES[method]}</svg>'


# Plain and TO side by side, as the paper has them.


def _comparison(report: Report) -> str:
    merging = _has_merging(report)
    budgets = report.get("budgets", [])
    choices = {budget: _choice(report, budget) for budget in budgets}
    gains = [choice.get(key) for choice in choices.values() for key in ("gain", "over_merge")]
    ends = [abs(end) for gain in gains if gain for end in gain["interval"]]
    longest = max(ends, default=0) or 1
    heads = ["Tokens", "Plain", "Token Optimization (TO)", "Gain over plain"]
    heads += ["Token merging", "Gain over merging"] if merging else []
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    rows = "".join(
        _comparison_row(report, budget, choice, merging, longest)
        for budget, choice in choices.items()
    )
    return f"""<section>
<h2>Plain and TO at each budget</h2>
<p class="legend">Top-1 accuracy with its 95 % interval, and the grid that gives it. Plain runs a
grid that has just so many tokens; TO selects as many from a larger one. Gains are points of a
percent, with 95 % intervals paired over the same videos; they are coloured where the interval is
clear of zero. What is not known on the reporting split yet is of the choosing split, and says
so.</p>
<div class="card"><table class="rows stacked">
<thead><tr>{head}</tr></thead>
<tbody>
{rows}</tbody>
</table></div>
</section>
"""


def _comparison_row(
    report: Report, budget: int, choice: dict[str, Any], merging: bool, longest: float
) -> str:
    columns = [
        ("Plain", _accuracy(report, budget, choice.get("plain"))),
        ("TO", _accuracy(report, budget, choice.get("select"))),
        ("Gain over plain", _gain(choice.get("gain"), longest)),
    ]
    if merging:
        columns += [
            ("Token merging", _accuracy(report, budget, choice.get("merge"))),
            ("Gain over merging", _gain(choice.get("over_merge"), longest)),
        ]
    head = f'<th scope="row"><span class="budget">{_count(budget, "token")}</span></th>'
    # Where a screen is too narrow for columns, cells say themselves what they are.
    row = "".join(
        f'<td data-label="{name}"{" class=gain" if "Gain" in name else ""}>{text}</td>'
        for name, text in columns
    )
    return f"<tr>{head}{row}</tr>\n"


def _accuracy(report: Report, budget: int, name: str | None) -> str:
    """Top-1 with its interval on the reporting split, or, marked so, on the choosing one."""
    cell = report.get("cells", {}).get(name, {})
    own = cell.get("report") or cell.get("choose")
    if not own:
        return "&ndash;"
    split = "choosing split" + ("" if _is_chosen(report, budget) else ", so far")
    tag = "" if cell.get("report") else f' <span class="tag">{split}</span>'
    setting = f"{_count(cell['frames'], 'frame')} of {cell['resolution']} px, head {cell['head']}"
    return (
        f'<span class="value">{_percent(own["top1"])}</span>{tag}'
        f'<span class="small">{_range(own.get("top1_interval"))}</span>'
        f'<span class="small">{setting}</span>'
    )


def _gain(gain: dict[str, Any] | None, longest: float) -> str:
    """A paired difference; `longest` is the end of its bar."""
    if not gain:
        return "&ndash;"
    low, high = gain["interval"]
    kind = "better" if low > 0 else "worse" if high < 0 else "even"
    left, middle, right = (50 + 50 * x / longest for x in (low, gain["top1"], high))
    videos = f", {_count(gain['videos'], 'video')}" if "videos" in gain else ""
    return (
        f'<div class="{kind}"><span class="value">{_points(gain["top1"])}</span>'
        f'<div class="whisker"><div style="left:{left:.1f}%;width:{right - left:.1f}%"></div>'
        f'<div style="left:{middle:.1f}%"></div></div></div>'
        f'<span class="small">{_points(low)} to {_points(high)}{videos}</span>'
    )


def _prices(report: Report) -> str:
    """What the cells of the comparison cost: a row for each method at each budget."""
    devices = _device_names(report)
    heads = ["Tokens", "Method", "GFLOPs", *(f"ms, {html.escape(name)}" for name in devices)]
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    rows = ""
    for budget in report.get("budgets", []):
        choice = _choice(report, budget)
        names = [choice[method] for method in ("plain", "select", "merge") if choice.get(method)]
        rows += "".join(
            _price_row(report, budget, name, again=i > 0) for i, name in enumerate(names)
        )
    if not rows:
        return ""
    return f"""<section>
<h2>What that costs</h2>
<p class="legend">GFLOPs are billions of multiply-accumulates of one clip; "kept" leaves out, as the
paper does, the patches that are embedded and compared but not kept. Milliseconds are those of one
clip, their median; 95 % of the runs take less than p95.</p>
<div class="card sideways"><table class="rows costs">
<thead><tr>{head}</tr></thead>
<tbody>
{rows}</tbody>
</table></div>
</section>
"""


def _price_row(report: Report, budget: int, name: str, again: bool) -> str:
    cell = report["cells"][name]
    method = cell["method"]
    costs = [_costs(report, device, name) for device in _device_names(report)]
    columns = (
        f"{_mark(method)}{SHORT[method]}" + f'<span class="small">{_grid(cell)} px</span>',
        _number(cell.get("gflops")) + _small(cell.get("gflops_kept"), "{} kept"),
        *(
            _number(own.get("milliseconds")) + _small(own.get("milliseconds_p95"), "p95 {}")
            for own in costs
        ),
    )
    kind = ' class="again"' if again else ""
    row = "".join(f"<td>{text}</td>" for text in columns)
    return f'<tr{kind}><th scope="row">{budget:,}</th>{row}</tr>\n'


def _small(value: float | None, words: str) -> str:
    return "" if value is None else f'<span class="small">{words.format(_number(value))}</span>'


# Charts of accuracy against cost.


class Point(NamedTuple):
    """A cell in a chart."""

    cost: float
    top1: float  # percent
    method: str
    grid: str
    partial: bool  # measured on fewer videos than others


class Chart(NamedTuple):
    title: str
    unit: str
    points: list[Point]
    front: list[int]  # indices of points


def _chart_list(report: Report) -> list[Chart]:
    """Top-1 on the choosing split against tokens, GFLOPs, and milliseconds on each device."""
    charts = [
        _chart(report, "Tokens", "tokens", lambda name, cell: cell.get("tokens")),
        _chart(report, "GFLOPs", "GFLOPs", lambda name, cell: cell.get("gflops")),
    ]
    for device in _device_names(report):

        def latency(name: str, cell: Cell, device: str = device) -> float | None:
            return _costs(report, device, name).get("milliseconds")

        charts.append(_chart(report, device, "milliseconds a clip", latency))
    return [chart for chart in charts if chart.points]


def _chart(
    report: Report, title: str, unit: str, cost_of: Callable[[str, Cell], float | None]
) -> Chart:
    most = _most_videos(report)
    points = [
        Point(cost, 100 * own["top1"], cell["method"], _grid(cell), own["videos"] < most)
        for name, cell in _measured(report)
        if (own := cell["choose"]) and (cost := cost_of(name, cell)) is not None
    ]
    whole = [i for i, point in enumerate(points) if not point.partial]
    front = pareto([(points[i].cost, points[i].top1) for i in whole])
    return Chart(title, unit, points, [whole[i] for i in front])


def _charts(report: Report) -> str:
    charts = _chart_list(report)
    if not charts:
        return ""
    columns = 2 if len(charts) in (2, 4) else 3
    wide = WIDE if columns == 2 else THREE_WIDE
    figures = "".join(_figure(report, chart, wide) for chart in charts)
    used = {point.method for chart in charts for point in chart.points}
    methods = [method for method in METHODS if method in used]
    keys = "".join(f"<span>{_mark(method)}{METHODS[method]}</span>" for method in methods)
    line = '<path d="M0 9 12 6 24 2" fill="none"/><circle cx="12" cy="6" r="3.5"/>'
    keys += (
        f'<span><svg class="line" viewBox="0 0 24 12" aria-hidden="true">{line}</svg>front</span>'
    )
    if any(point.partial for chart in charts for point in chart.points):
        hollow = "".join(_mark(method, hollow=True) for method in methods)
        keys += f"<span>{hollow}fewer videos</span>"
    return f"""<section>
<h2>Accuracy and cost</h2>
<p class="legend">Every cell of the search by its top-1 accuracy on the choosing split. No cell is
better than one on the front at no more cost; its large points have their grids beside them. Cells
measured on fewer videos are hollow and no part of the front.</p>
<p class="keys">{keys}</p>
<div class="panels" style="--columns:{columns}">
{figures}</div>
</section>
"""


def _figure(report: Report, chart: Chart, wide: tuple[int, int]) -> str:
    """A chart in light and dark, and each for wide and narrow screens."""
    narrow, dark = "(max-width: 48rem)", "(prefers-color-scheme: dark)"
    sources = "".join(
        f'<source media="{media}" srcset="{_svg(report, chart, colours, size)}" '
        f'width="{size[0]}" height="{size[1]}">\n'
        for media, colours, size in (
            (f"{narrow} and {dark}", DARK, NARROW),
            (narrow, LIGHT, NARROW),
            (dark, DARK, wide),
        )
    )
    front = "; ".join(
        f"{SHORT[point.method]} {point.grid} px, {_number(point.cost)} {chart.unit}, "
        f"{point.top1:.1f} %"
        for point in (chart.points[i] for i in chart.front)
    )
    alt = html.escape(f"Top-1 accuracy against {chart.unit} of {len(chart.points)} cells. {front}")
    return (
        f'<figure class="card"><h3>{html.escape(chart.title)}</h3>\n<picture>\n{sources}'
        f'<img src="{_svg(report, chart, LIGHT, wide)}" alt="{alt}" '
        f'width="{wide[0]}" height="{wide[1]}">\n</picture></figure>\n'
    )


def _svg(report: Report, chart: Chart, colours: dict[str, str], size: tuple[int, int]) -> str:
    """The address of a chart of `size` pixels that holds all of it."""
    import matplotlib
    from matplotlib.figure import Figure

    width, height = size
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # a point is a pixel
    left, right, top, bottom = 36, 8, 26, 40
    across, up = width - left - right, height - top - bottom
    axes = figure.add_axes((left / width, bottom / height, across / width, up / height))
    _draw_chart(axes, report, chart, colours)
    content = io.BytesIO()
    # Letters as outlines look the same everywhere; names that are not random, the same every time.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "report"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(content, format="svg", transparent=True, metadata=nothing)
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def _draw_chart(axes: "Axes", report: Report, chart: Chart, colours: dict[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    _style(axes, colours)
    _limits(axes, chart)
    _cost_ticks(axes, report, chart)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="y", color=colours["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    scale = ", log scale" if axes.get_xscale() == "log" else ""
    axes.set_xlabel(chart.unit + scale, color=colours["quiet"], fontsize=11, labelpad=6)
    axes.set_title("top-1, %", loc="left", color=colours["quiet"], fontsize=11, pad=8)
    front = [chart.points[i] for i in chart.front]
    axes.plot(*_places(front), color=colours["quiet"], linewidth=1.5)
    on_front = set(chart.front)
    rest = [point for i, point in enumerate(chart.points) if i not in on_front]
    for method, colour in _method_colours(colours).items():
        own = [point for point in rest if point.method == method]
        aside = ASIDE[method] if chart.unit == "tokens" else 0
        _scatter(axes, [point for point in own if point.partial], aside, rim=colour, alpha=0.6)
        whole = [point for point in own if not point.partial]
        _scatter(axes, whole, aside, fill=colour, alpha=0.55)
    for method, colour in _method_colours(colours).items():
        own = [point for point in front if point.method == method]
        _scatter(axes, own, fill=colour, rim=colours["card"], size=9.5)
    _name_front(axes, front, colours)


def _method_colours(colours: dict[str, str]) -> dict[str, str]:
    """In the order of drawing: TO comes last, on top."""
    return {"merge": colours["merge"], "plain": colours["plain"], "select": colours["accent"]}


def _places(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.cost for point in points], [point.top1 for point in points]


def _scatter(
    axes: "Axes",
    points: Sequence[Point],
    aside: float = 0,
    fill: str = "none",
    rim: str = "none",
    size: float = 5.5,
    alpha: float = 1,
) -> None:
    """Draws points of one method, `aside` of their places, with markers of `size`, in points."""
    from matplotlib.transforms import ScaledTranslation

    if points:
        shift = ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans)
        axes.plot(
            *_places(points),
            **{"linestyle": "none", "marker": MARKERS[points[0].method], "markersize": size},
            **{"markerfacecolor": fill, "markeredgecolor": rim, "markeredgewidth": 0.9},
            **{"alpha": alpha, "transform": axes.transData + shift},
        )


def _style(axes: "Axes", colours: dict[str, str]) -> None:
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colours["quiet"])
    axes.tick_params(length=0, labelsize=11, labelcolor=colours["quiet"], pad=5)


def _limits(axes: "Axes", chart: Chart) -> None:
    """Limits with room around the points, above and left of them for the names of the front."""
    costs, accuracies = _places(chart.points)
    name = 1.2 * NAME / (axes.bbox.width * 72 / axes.figure.dpi)  # share of the width
    low, high = min(costs), max(costs)
    if low > 0 and high / low > LOG_FROM:
        axes.set_xscale("log")
        axes.set_xlim(low / (high / low) ** name, high * (high / low) ** 0.05)
    else:
        room = high - low or high or 1
        axes.set_xlim(low - name * room, high + 0.05 * room)
    low, high = min(accuracies), max(accuracies)
    room = max(0.05 * (high - low), 1)
    axes.set_ylim(low - room, high + 2 * room)


def _cost_ticks(axes: "Axes", report: Report, chart: Chart) -> None:
    """Ticks at the budgets; at round numbers for other costs."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    low, high = axes.get_xlim()
    if chart.unit == "tokens":
        ticks = [budget for budget in report.get("budgets", []) if low <= budget <= high]
    elif axes.get_xscale() == "log":
        ticks = _round_numbers(low, high)
    else:
        ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{tick:,g}" if tick < 1e6 else f"{tick:g}" for tick in ticks])


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... between two numbers; more of them where those are fewer than three."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 6, 8)):
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks


def _name_front(axes: "Axes", front: Sequence[Point], colours: dict[str, str]) -> None:
    """Grids of the front, above and to the left of their points, where no other can be.

    Of names that would overlap, that of the more accurate point stays.
    """
    taken: list[tuple[float, float]] = []
    for point in reversed(front):
        x, y = axes.transData.transform((point.cost, point.top1)) * 72 / axes.figure.dpi
        if any(abs(x - left) < NAME and abs(y - below) < 12 for left, below in taken):
            continue
        taken.append((x, y))
        axes.annotate(
            *(point.grid, (point.cost, point.top1), (-4, 5)),
            **{"textcoords": "offset points", "ha": "right", "va": "bottom"},
            **{"fontsize": 10, "color": colours["ink"]},
        )


# Heat maps of frames and resolution.


def _heat(report: Report, budget: int) -> dict[tuple[int, int], Cell]:
    """{(frames, resolution): the cell of its best head} of TO at a budget.

    Where a grid has as many tokens as the budget there is nothing to select: it is the plain cell.
    """
    most = _most_videos(report)
    found: dict[tuple[int, int], Cell] = {}
    for _, cell in _measured(report):
        if cell["budget"] != budget or cell["method"] not in ("select", "plain"):
            continue
        grid = cell["frames"], cell["resolution"]
        if grid not in found or _rank(cell, most) > _rank(found[grid], most):
            found[grid] = cell
    return found


def _rank(cell: Cell, most: int) -> tuple[bool, float, float]:
    """Order of cells: those on all videos first, then accuracy, then cheapness."""
    own = cell["choose"]
    return own["videos"] >= most, own["top1"], -_gflops(cell)


def _lattice(report: Report) -> tuple[list[int], list[int]]:
    """Frames and resolutions, ascending."""
    keys = ("frames", "frames"), ("resolutions", "resolution")
    frames, resolutions = (
        sorted({*report.get(many, ()), *(cell[one] for _, cell in _cells(report))})
        for many, one in keys
    )
    return frames, resolutions


def _known_heats(report: Report) -> dict[int, dict[tuple[int, int], Cell]]:
    """The heat map of each budget that has one."""
    heats = {budget: _heat(report, budget) for budget in report.get("budgets", [])}
    return {budget: heat for budget, heat in heats.items() if heat}


def _warmths(report: Report, heat: dict[tuple[int, int], Cell]) -> dict[tuple[int, int], float]:
    """Where each cell that was measured on all videos is between the worst (0) and the best (1)."""
    most = _most_videos(report)
    whole = {k: c["choose"]["top1"] for k, c in heat.items() if c["choose"]["videos"] >= most}
    low, high = min(whole.values(), default=0), max(whole.values(), default=0)
    return {k: (top1 - low) / (high - low) if high > low else 1 for k, top1 in whole.items()}


def _best(report: Report, heat: dict[tuple[int, int], Cell]) -> tuple[int, int] | None:
    most = _most_videos(report)
    best = max(heat, key=lambda grid: _rank(heat[grid], most))
    return best if heat[best]["choose"]["videos"] >= most else None


def _heat_maps(report: Report) -> str:
    heats = _known_heats(report)
    if not heats:
        return ""
    columns = 2 if len(heats) in (2, 4) else 3
    tables = "".join(_heat_table(report, budget, heat) for budget, heat in heats.items())
    return f"""<section>
<h2>Frames and resolution</h2>
<p class="legend">Top-1 accuracy of TO on the choosing split in percent, of the best head. Rows are
frames, columns pixels of a side. In each table the colour goes from its worst grid to its best,
which is framed. Empty grids have too few tokens for the budget; a dot is a grid that was not
measured; <i>quiet italics</i> are of fewer videos. A grid of just as many tokens as the budget is
plain.</p>
<div class="panels" style="--columns:{columns}">
{tables}</div>
</section>
"""


def _heat_table(report: Report, budget: int, heat: dict[tuple[int, int], Cell]) -> str:
    frames, resolutions = _lattice(report)
    best, warmths = _best(report, heat), _warmths(report, heat)
    head = "".join(f'<th scope="col">{resolution}</th>' for resolution in resolutions)
    rows = ""
    for count in frames:
        grids = [(count, resolution) for resolution in resolutions]
        own = "".join(_heat_cell(budget, g, heat.get(g), warmths.get(g), g == best) for g in grids)
        rows += f'<tr><th scope="row">{count}</th>{own}</tr>\n'
    return f"""<div class="card"><h3>{_count(budget, "token")}</h3>
<table class="heat">
<thead><tr><td></td>{head}</tr></thead>
<tbody>
{rows}</tbody>
</table></div>
"""


def _heat_cell(
    budget: int, grid: tuple[int, int], cell: Cell | None, warmth: float | None, best: bool
) -> str:
    if not cell:
        frames, resolution = grid
        fills = frames * (resolution // PATCH) ** 2 >= budget
        return f"<td>{'&middot;' if fills else ''}</td>"
    own = cell["choose"]
    title = f"{SHORT[cell['method']]} {_grid(cell)} px, head {cell['head']}"
    title += f", {_count(own['videos'], 'video')}"
    number = f"{100 * own['top1']:.1f}"
    if warmth is None:
        return f'<td class="partial" title="{title}">{number}</td>'
    kind, heat = "known best" if best else "known", _mix(warmth)
    return f'<td class="{kind}" title="{title}" style="--heat:{heat:.0f}%">{number}</td>'


def _mix(warmth: float) -> float:
    """Percent of the accent in a cell of a heat map."""
    cold, hot = HEAT
    return cold + (hot - cold) * warmth


# Lists of everything.


def _skipped(report: Report) -> str:
    skipped = report.get("skipped", [])
    if not skipped:
        return ""
    rows = ""
    for one in skipped:
        cell = report.get("cells", {}).get(one["cell"], {})
        row = [f"{one['videos']:,}", _share(cell, "choose"), _behind(cell)]
        columns = "".join(f"<td>{text}</td>" for text in row)
        rows += f'<tr><th scope="row">{html.escape(one["cell"])}</th>{columns}</tr>\n'
    heads = ("Cell", "After videos", "Top-1 on these", "Behind the best, points")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return f"""<details>
<summary>{_count(len(skipped), "cell")} stopped early by halving</summary>
<div class="scroll"><table class="all">
<thead><tr>{head}</tr></thead>
<tbody>
{rows}</tbody>
</table></div>
</details>
"""


def _share(cell: Cell, split: str, top: str = "top1") -> str:
    """An accuracy with its interval."""
    own = cell.get(split) or {}
    if top not in own:
        return "&ndash;"
    interval = own.get(f"{top}_interval")
    return _percent(own[top]) + (f" ({_range(interval)})" if interval else "")


def _behind(cell: Cell) -> str:
    own = cell.get("behind")
    if not own:
        return "&ndash;"
    top1, low, high = (_points(value, "") for value in (own["top1"], *own["interval"]))
    return f"{top1} ({low} to {high})"


def _every_cell(report: Report) -> str:
    cells = _cells(report)
    if not cells:
        return ""
    devices = _device_names(report)
    split = "Videos", "Top-1 (95 % interval)", "Top-5 (95 % interval)"
    cost = (
        "ms",
        "95 % below",
        "ms a batch",
        "95 % below",
        "Clips a second",
        "Memory, MB",
        "Compiling, s",
    )
    groups = [
        *(("Cell", ("Name", "Tokens")), ("Choosing split", (*split, "Behind the best, points"))),
        *(("Reporting split", split), ("GFLOPs", ("All", "Kept"))),
        *((_device_title(report, device), cost) for device in devices),
    ]
    top = "".join(
        f'<th scope="colgroup" colspan="{len(names)}">{html.escape(group)}</th>'
        for group, names in groups
    )
    head = "".join(f'<th scope="col">{name}</th>' for _, names in groups for name in names)
    rows = "".join(_cell_row(report, name, cell) for name, cell in cells)
    return f"""<details>
<summary>All {_count(len(cells), "cell")}</summary>
<div class="scroll"><table class="all">
<thead><tr>{top}</tr>
<tr>{head}</tr></thead>
<tbody>
{rows}</tbody>
</table></div>
</details>
"""


def _device_title(report: Report, device: str) -> str:
    batch = report["devices"][device].get("batch")
    return device if batch is None else f"{device}, batches of {batch}"


def _cell_row(report: Report, name: str, cell: Cell) -> str:
    tokens = cell.get("tokens")
    row = ["&ndash;" if tokens is None else f"{tokens:,}"]
    for split in ("choose", "report"):
        videos = (cell.get(split) or {}).get("videos")
        row.append("&ndash;" if videos is None else f"{videos:,}")
        row += [_share(cell, split, top) for top in ("top1", "top5")]
        row += [_behind(cell)] if split == "choose" else []
    row += [_number(cell.get(key)) for key in ("gflops", "gflops_kept")]
    for device in _device_names(report):
        costs = _costs(report, device, name)
        row += [_number(costs.get(key)) for key in COSTS]
    columns = "".join(f"<td>{text}</td>" for text in row)
    return f'<tr><th scope="row">{_mark(cell["method"])}{html.escape(name)}</th>{columns}</tr>\n'


# The picture for slides.


def _png(report: Report) -> bytes:
    """The charts, and below them the heat maps, on a light ground."""
    from matplotlib.figure import Figure

    charts, heats = _chart_list(report), _known_heats(report)
    if max(map(len, _lattice(report))) > LEGIBLE:
        heats = {}
    columns = min(COLUMNS, max(2, len(charts), len(heats)))
    chart_rows, heat_rows = (math.ceil(len(own) / columns) for own in (charts, heats))
    rows = max(1, chart_rows + heat_rows)
    notes = textwrap.wrap(" ".join(report.get("notes", [])), 56 * columns)
    width, foot = 4 * columns + 0.4, 0.65 + 0.2 * len(notes)  # inches, as all here
    height = 1.75 + 3.1 * rows + 1.25 * (rows - 1) + foot
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    space = figure.add_gridspec(
        *(rows, columns),
        **{"left": 0.55 / width, "right": 1 - 0.2 / width, "wspace": 0.18},
        **{"top": 1 - 1.75 / height, "bottom": foot / height, "hspace": 1.25 / 3.1},
    )
    _picture_texts(figure, report, notes)
    _picture_keys(figure, charts)
    for i, chart in enumerate(charts):
        axes = figure.add_subplot(space[i // columns, i % columns])
        _draw_chart(axes, report, chart, LIGHT)
        _picture_title(axes, chart.title)
    for i, (budget, heat) in enumerate(heats.items()):
        axes = figure.add_subplot(space[chart_rows + i // columns, i % columns])
        _draw_heat(axes, report, heat)
        _picture_title(axes, f"TO at {_count(budget, 'token')}")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _picture_texts(figure: "Figure", report: Report, notes: Sequence[str]) -> None:
    """The title and what it is measured on at the top, the notes at the foot."""
    width, height = figure.get_size_inches()
    columns = int(width / 4)
    split = report.get("choose") or {}
    title = f"Token Optimization of FluxViT-{report.get('network', '?')}"
    facts = f"{report.get('views', '?')} views, top-1 on {split.get('data', 'the choosing split')}"
    for text, y, size, weight, colour in (
        (_cut(title, 22 * columns), height - 0.4, 16, "bold", "ink"),
        (_cut(facts, 44 * columns), height - 0.68, 10.5, "normal", "quiet"),
        *((line, 0.2 * i, 10.5, "normal", "ink") for i, line in enumerate(reversed(notes), 1)),
    ):
        figure.text(
            *(0.25 / width, y / height, text),
            **{"fontsize": size, "fontweight": weight, "color": LIGHT[colour], "parse_math": False},
        )


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 3] + "..."


def _picture_keys(figure: "Figure", charts: Sequence[Chart]) -> None:
    """What the markers are."""
    from matplotlib.lines import Line2D

    width, height = figure.get_size_inches()
    points = [point for chart in charts for point in chart.points]
    used, marker = {point.method for point in points}, {"linestyle": "none", "markersize": 7}
    colours = _method_colours(LIGHT)
    keys = [
        Line2D([], [], marker=MARKERS[method], color=colours[method], label=label, **marker)
        for method, label in METHODS.items()
        if method in used
    ]
    keys.append(Line2D([], [], color=LIGHT["quiet"], linewidth=1.5, label="front"))
    if any(point.partial for point in points):
        hollow = {"markerfacecolor": "none", "color": LIGHT["quiet"], "label": "fewer videos"}
        keys.append(Line2D([], [], marker="o", **hollow, **marker))
    figure.legend(
        handles=keys,
        **{"loc": "upper left", "ncols": len(keys), "frameon": False, "fontsize": 10.5},
        **{"borderpad": 0, "borderaxespad": 0, "handletextpad": 0.3},
        bbox_to_anchor=(0.25 / width, 1 - 0.82 / height),
    )


def _picture_title(axes: "Axes", title: str) -> None:
    axes.annotate(
        *(_cut(title, 35), (0, 1), (0, 27)),
        **{"xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom"},
        **{"fontsize": 11, "fontweight": "bold", "color": LIGHT["ink"], "parse_math": False},
    )


def _draw_heat(axes: "Axes", report: Report, heat: dict[tuple[int, int], Cell]) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    frames, resolutions = _lattice(report)
    warmths, best = _warmths(report, heat), _best(report, heat)
    shares = [[_mix(warmths.get((t, side), math.nan)) for side in resolutions] for t in frames]
    colours = LinearSegmentedColormap.from_list("accent", (LIGHT["card"], LIGHT["accent"]))
    axes.imshow(shares, cmap=colours, vmin=0, vmax=100, aspect="auto")
    for (count, side), cell in heat.items():
        place = resolutions.index(side), frames.index(count)
        partial, is_best = (count, side) not in warmths, (count, side) == best
        axes.text(
            *place,
            f"{100 * cell['choose']['top1']:.1f}",
            **{"ha": "center", "va": "center", "fontsize": 9},
            color=LIGHT["quiet" if partial else "ink"],
            fontstyle="italic" if partial else "normal",
            fontweight="bold" if is_best else "normal",
        )
        if is_best:
            corner = place[0] - 0.5, place[1] - 0.5
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=LIGHT["ink"], lw=1.5))
    _style(axes, LIGHT)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks(range(len(resolutions)), resolutions)
    axes.set_yticks(range(len(frames)), frames)
    axes.set_xlabel("pixels of a side", color=LIGHT["quiet"], fontsize=11)
    axes.set_title("frames", loc="left", color=LIGHT["quiet"], fontsize=11, pad=8)
