"""Tables of the accuracy and cost of plain and TO at each budget, as in the paper."""

import html
from typing import Any

from fluxvit_jax.reports.elements import row, section, small, table
from fluxvit_jax.reports.wording import (
    count,
    interval,
    number,
    percent,
    points,
)
from fluxvit_jax.token_optimization.report.reading import (
    METHODS,
    SHORT,
    Report,
    choice,
    costs,
    grid,
    is_chosen,
)
from fluxvit_jax.token_optimization.report.style import mark

ACCURACY_LEGEND = """Top-1 accuracy with its 95 % interval, and the grid that gives it. Plain runs a
grid without selection, of up to a quarter fewer tokens than the budget; TO selects as many as the
budget from a larger one. Gains are points of a percent, with 95 % intervals paired over the same
videos; they are colored where the interval is clear of zero. What is not known on the reporting
split yet is of the choosing split, and says so."""
PRICE_LEGEND = """GFLOPs are billions of multiply-accumulates of one clip; "kept" leaves out, as the
paper does, the patches that are embedded and compared but not kept. Milliseconds are those of one
clip, their median; 95 % of the runs take less than p95."""


COLUMNS = {
    "plain": "Plain",
    "select": "Token Optimization (TO)",
    "gain": "Gain over plain",
    "merge": "Token merging",
    "over_merge": "Gain over merging",
}


def accuracies(report: Report) -> str:
    """The section of accuracies: a row per budget."""
    merges = any(cell["method"] == "merge" for cell in report["cells"].values())
    columns = COLUMNS if merges else dict(list(COLUMNS.items())[:3])
    gains = [chosen.get(key) for chosen in report["chosen"].values() if chosen for key in columns]
    ends = [abs(end) for gain in gains if isinstance(gain, dict) for end in gain["interval"]]
    longest = max(ends, default=0) or 1
    rows = [_accuracy_row(report, budget, columns, longest) for budget in report["budgets"]]
    content = table("rows stacked", ("Tokens", *columns.values()), rows)
    title = "Plain and TO at each budget"
    return section(title, ACCURACY_LEGEND, f'<div class="card">{content}</div>\n')


def _accuracy_row(report: Report, budget: int, columns: dict[str, str], longest: float) -> str:
    chosen = choice(report, budget)
    cells = f'<th scope="row"><span class="value">{count(budget, "token")}</span></th>'
    for key, title in columns.items():
        entry = chosen.get(key)
        text = _accuracy(report, budget, entry) if key in METHODS else _gain(entry, longest)
        # On a screen too narrow for columns, each cell shows its own title.
        cells += f'<td data-label="{title}">{text}</td>'
    return f"<tr>{cells}</tr>\n"


def _accuracy(report: Report, budget: int, name: str | None) -> str:
    """Top-1 with its interval on the reporting split, else on the choosing split, with a tag."""
    cell = report["cells"].get(name, {})
    accuracy = cell.get("report") or cell.get("choose")
    if not accuracy:
        return "&ndash;"
    split = "choosing split" + ("" if is_chosen(report, budget) else ", so far")
    tag = "" if cell.get("report") else f' <span class="tag">{split}</span>'
    setting = f"{count(cell['frames'], 'frame')} of {cell['resolution']} px, head {cell['head']}"
    if cell["budget"] != budget:
        setting += f", {count(cell['budget'], 'token')}"
    value = f'<span class="value">{percent(accuracy["top1"])}</span>{tag}'
    return value + small(interval(accuracy.get("top1_interval"))) + small(setting)


def _gain(gain: dict[str, Any] | None, longest: float) -> str:
    """A paired difference; `longest` is the end of its bar."""
    if not gain:
        return "&ndash;"
    low, high = gain["interval"]
    kind = "better" if low > 0 else "worse" if high < 0 else "even"
    left, middle, right = (50 + 50 * x / longest for x in (low, gain["top1"], high))
    videos = f", {count(gain['videos'], 'video')}" if "videos" in gain else ""
    return (
        f'<div class="{kind}"><span class="value">{points(gain["top1"])}</span>'
        f'<div class="whisker"><div style="left:{left:.1f}%;width:{right - left:.1f}%"></div>'
        f'<div style="left:{middle:.1f}%"></div></div></div>'
        + small(f"{points(low)} to {points(high)}{videos}")
    )


def prices(report: Report) -> str:
    """The section of costs: a row for each method at each budget."""
    heads = ["Tokens", "Method", "GFLOPs"]
    heads += [f"ms, {html.escape(device)}" for device in report["devices"]]
    rows = []
    for budget in report["budgets"]:
        chosen = choice(report, budget)
        names = [chosen[method] for method in ("plain", "select", "merge") if chosen.get(method)]
        for i, name in enumerate(names):
            rows.append(row(f"{budget:,}", _prices_of(report, name), "again" if i else ""))
    if not rows:
        return ""
    content = f'<div class="card sideways">{table("rows costs", heads, rows)}</div>\n'
    return section("What that costs", PRICE_LEGEND, content)


def _prices_of(report: Report, name: str) -> list[str]:
    cell = report["cells"][name]
    method, times = cell["method"], [costs(report, device, name) for device in report["devices"]]
    return [
        mark(method) + SHORT[method] + small(f"{grid(cell)} px"),
        _price(cell, "gflops", "gflops_kept", "{} kept"),
        *(_price(timing, "milliseconds", "milliseconds_p95", "p95 {}") for timing in times),
    ]


def _price(known: dict[str, Any], key: str, extra: str, words: str) -> str:
    """A cost, and below it another one in `words`, where they are known."""
    more = small(words.format(number(known[extra]))) if extra in known else ""
    return number(known.get(key)) + more
