"""Charts of accuracy against cost, and the section of the page that shows them."""

import base64
import html
import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator

from fluxvit_jax.report import elements
from fluxvit_jax.report.reading import METHODS, SHORT, Report, costs, measured, whole
from fluxvit_jax.report.style import DARK, LIGHT, MARKERS, of_methods
from fluxvit_jax.report.wording import grid, number

LOG_FROM = 4  # axes are logarithmic from this ratio of their ends
WIDE, NARROW = (600, 372), (380, 330)  # pixels of a chart
THREE_WIDE = (440, 340)  # where three charts share a row
NAME = 48  # points that the name of a grid is wide, 24x336 being among the longest

LEGEND = """Every cell of the search by its top-1 accuracy on the choosing split. No cell is better
than one on the front at no more cost; its large points have their grids beside them. Cells measured
on fewer videos are hollow and no part of the front."""


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

    @property
    def front(self) -> list[Point]:
        own = [point for point in self.points if not point.partial]
        return [own[i] for i in pareto([point[:2] for point in own])]


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


def charts_of(report: Report) -> list[Chart]:
    """Top-1 on the choosing split against tokens, GFLOPs, and milliseconds on each device."""
    cells, best = measured(report), whole(report)

    def chart(title: str, unit: str, cost: dict[str, float | None]) -> Chart:
        points = [
            Point(cost[name], 100 * c["choose"]["top1"], c["method"], grid(c), name not in best)
            for name, c in cells.items()
            if cost[name] is not None
        ]
        return Chart(title, unit, points)

    charts = [
        chart("Tokens", "tokens", {name: cell.get("tokens") for name, cell in cells.items()}),
        chart("GFLOPs", "GFLOPs", {name: cell.get("gflops") for name, cell in cells.items()}),
    ]
    for device in report["devices"]:
        times = {name: costs(report, device, name).get("milliseconds") for name in cells}
        charts.append(chart(device, "milliseconds a clip", times))
    return [chart for chart in charts if chart.points]


# In the page.


def section(report: Report) -> str:
    """All charts and what their marks mean."""
    charts = charts_of(report)
    if not charts:
        return ""
    wide = WIDE if elements.columns_of(charts) == 2 else THREE_WIDE
    figures = [_figure(report, chart, wide) for chart in charts]
    content = f'<p class="keys">{_keys(charts)}</p>\n{elements.side_by_side(figures)}'
    return elements.section("Accuracy and cost", LEGEND, content)


def _keys(charts: Sequence[Chart]) -> str:
    methods = methods_in(charts)
    line = '<path d="M0 9 12 6 24 2" fill="none"/><circle cx="12" cy="6" r="3.5"/>'
    keys = [elements.mark(method) + METHODS[method] for method in methods]
    keys.append(f'<svg class="line" viewBox="0 0 24 12" aria-hidden="true">{line}</svg>front')
    if has_partial(charts):
        keys.append("".join(elements.mark(own, hollow=True) for own in methods) + "fewer videos")
    return "".join(f"<span>{key}</span>" for key in keys)


def methods_in(charts: Sequence[Chart]) -> list[str]:
    used = {point.method for chart in charts for point in chart.points}
    return [method for method in METHODS if method in used]


def has_partial(charts: Sequence[Chart]) -> bool:
    """Whether charts have cells that were measured on fewer videos than others."""
    return any(point.partial for chart in charts for point in chart.points)


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
        f"{SHORT[point.method]} {point.grid} px, {number(point.cost)} {chart.unit}, "
        f"{point.top1:.1f} %"
        for point in chart.front
    )
    alt = html.escape(f"Top-1 accuracy against {chart.unit} of {len(chart.points)} cells. {front}")
    return (
        f'<figure class="card"><h3>{html.escape(chart.title)}</h3>\n<picture>\n{sources}'
        f'<img src="{_svg(report, chart, LIGHT, wide)}" alt="{alt}" '
        f'width="{wide[0]}" height="{wide[1]}">\n</picture></figure>\n'
    )


def _svg(report: Report, chart: Chart, colours: dict[str, str], size: tuple[int, int]) -> str:
    """The address of a chart of `size` pixels that holds all of it."""
    width, height = size
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # a point is a pixel
    left, right, bottom, top = 36 / width, 1 - 8 / width, 40 / height, 1 - 26 / height
    axes = figure.add_axes((left, bottom, right - left, top - bottom))
    draw(axes, report, chart, colours)
    content = io.BytesIO()
    # Letters as outlines look the same everywhere; names that are not random, the same every time.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "report"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(content, format="svg", transparent=True, metadata=nothing)
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


# The drawing.


def draw(axes: Axes, report: Report, chart: Chart, colours: dict[str, str]) -> None:
    """Draws a chart: all of its points, the line of its front, and the names on it."""
    _set_limits(axes, chart)
    is_log = axes.get_xscale() == "log"
    style(axes, colours, chart.unit + (", log scale" if is_log else ""), "top-1, %")
    if chart.unit == "tokens":
        ticks = FixedLocator(report["budgets"])
    else:
        ticks = LogLocator(subs=(1, 2, 5)) if is_log else MaxNLocator(5)
    axes.xaxis.set_major_locator(ticks)
    axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:,g}")
    axes.minorticks_off()
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="y", color=colours["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    front = chart.front
    axes.plot(*_places(front), color=colours["quiet"], linewidth=1.5)
    for method, colour in of_methods(colours).items():
        own = [point for point in chart.points if point.method == method and point not in front]
        small = {"linestyle": "none", "marker": MARKERS[method], "markersize": 5.5}
        hollow = {"markerfacecolor": "none", "markeredgecolor": colour, "markeredgewidth": 0.9}
        full = {"color": colour, "markeredgecolor": "none", "alpha": 0.55}
        large = {"markersize": 9.5, "color": colour, "markeredgecolor": colours["card"]}
        axes.plot(*_places([p for p in own if p.partial]), **small | hollow, alpha=0.6)
        axes.plot(*_places([p for p in own if not p.partial]), **small | full)
        own = [point for point in front if point.method == method]
        axes.plot(*_places(own), **small | large, zorder=3)
    _name_front(axes, front, colours)


def style(axes: Axes, colours: dict[str, str], across: str, up: str) -> None:
    """What charts and heat maps have in common; names of the axes below and above on the left."""
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colours["quiet"])
    axes.tick_params(length=0, labelsize=11, labelcolor=colours["quiet"], pad=5)
    axes.set_xlabel(across, color=colours["quiet"], fontsize=11, labelpad=6)
    axes.set_title(up, loc="left", color=colours["quiet"], fontsize=11, pad=8)


def _places(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.cost for point in points], [point.top1 for point in points]


def _set_limits(axes: Axes, chart: Chart) -> None:
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


def _name_front(axes: Axes, front: Sequence[Point], colours: dict[str, str]) -> None:
    """Grids of the front, above and to the left of their points, where no other can be.

    Of names that would overlap, that of the more accurate point stays.
    """
    taken: list[tuple[float, float]] = []
    for point in reversed(front):
        x, y = axes.transData.transform(point[:2]) * 72 / axes.figure.dpi
        if any(abs(x - left) < NAME and abs(y - below) < 12 for left, below in taken):
            continue
        taken.append((x, y))
        axes.annotate(
            *(point.grid, point[:2], (-4, 5)),
            **{"textcoords": "offset points", "ha": "right", "va": "bottom"},
            **{"fontsize": 10, "color": colours["ink"]},
        )
