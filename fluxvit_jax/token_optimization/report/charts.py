"""Charts of accuracy against cost, and the section of the page that shows them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, Locator, LogLocator, MaxNLocator

from fluxvit_jax.reports import elements
from fluxvit_jax.reports.charts import (
    NARROW,
    WIDE,
    Colors,
    Size,
    add_axes,
    card,
    new_figure,
    picture,
    style,
)
from fluxvit_jax.reports.wording import number
from fluxvit_jax.token_optimization.report.reading import (
    METHODS,
    SHORT,
    Report,
    cascade_milliseconds,
    complete_cells,
    costs,
    grid,
    measured_cells,
)
from fluxvit_jax.token_optimization.report.style import DARK, LIGHT, MARKERS, mark, method_colors

Style = dict[str, Any]  # of a line, in matplotlib's words

LOG_FROM = 4  # axes are logarithmic from this ratio of their ends
THREE_WIDE = (440, 340)  # where three charts share a row
NAME = 48  # points that the name of a grid is wide, 24x336 being among the longest

LEGEND = """Every cell of the search by its top-1 accuracy on the choosing split. No cell is better
than one on the front at no more cost; its large points have their grids beside them. Cells measured
on fewer videos are hollow and no part of the front. Cascades are drawn at their mean cost of a
view."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A cell in a chart."""

    cost: float
    top1: float  # percent
    method: str
    grid: str
    partial: bool  # measured on fewer videos than others


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Accuracy against one kind of cost, in `unit`."""

    title: str
    unit: str
    points: list[Point]
    cascades: list[tuple[float, float]]  # mean cost and top-1 in percent, by rising cost

    @property
    def front(self) -> list[Point]:
        """The Pareto front of the completely measured cells."""
        complete = [point for point in self.points if not point.partial]
        return [complete[i] for i in pareto([(point.cost, point.top1) for point in complete])]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the Pareto front of (cost, accuracy), by rising cost.

    A point is dominated by one of higher accuracy at no more cost, or of less cost at no lower
    accuracy. Equal points do not dominate each other, and stay in their order.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


def charts_of(report: Report) -> list[Chart]:
    """Top-1 on the choosing split against tokens, GFLOPs, and milliseconds on each device."""
    cells, complete = measured_cells(report), complete_cells(report)

    def chart(
        title: str,
        unit: str,
        known: Mapping[str, float | None],
        average: Callable[[dict[str, Any]], float | None] = lambda own: None,
    ) -> Chart:
        points = [
            Point(
                cost=cost,
                top1=100 * cell["choose"]["top1"],
                method=cell["method"],
                grid=grid(cell),
                partial=name not in complete,
            )
            for name, cell in cells.items()
            if (cost := known[name]) is not None
        ]
        cascades = [
            (cost / report.get("view_count", 1), 100 * own["choose"]["top1"])
            for own in report["cascades"].values()
            if (cost := average(own)) is not None
        ]
        return Chart(
            title=title,
            unit=unit,
            points=points,
            cascades=[cascades[i] for i in pareto(cascades)],
        )

    charts = [
        chart("Tokens", "tokens", {name: cell.get("tokens") for name, cell in cells.items()}),
        chart(
            "GFLOPs",
            "GFLOPs",
            {name: cell.get("gflops") for name, cell in cells.items()},
            lambda own: own["choose"]["average_gflops"],
        ),
    ]
    for device in report["devices"]:
        times = {name: costs(report, device, name).get("milliseconds") for name in cells}
        charts.append(
            chart(
                device,
                "milliseconds a clip",
                times,
                partial(cascade_milliseconds, report, device=device),
            )
        )
    return [chart for chart in charts if chart.points]


# The page


def section(report: Report) -> str:
    """All charts with a legend of their marks."""
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
    keys = [mark(method) + METHODS[method] for method in methods]
    keys.append(f'<svg class="line" viewBox="0 0 24 12" aria-hidden="true">{line}</svg>front')
    if any(chart.cascades for chart in charts):
        dashed = '<path d="M0 9 12 6 24 2" fill="none" stroke-dasharray="4 2"/>'
        kind = 'class="line cascades" viewBox="0 0 24 12" aria-hidden="true"'
        keys.append(f"<svg {kind}>{dashed}</svg>cascades")
    if has_partial(charts):
        keys.append("".join(mark(method, hollow=True) for method in methods) + "fewer videos")
    return "".join(f"<span>{key}</span>" for key in keys)


def methods_in(charts: Sequence[Chart]) -> list[str]:
    used = {point.method for chart in charts for point in chart.points}
    return [method for method in METHODS if method in used]


def has_partial(charts: Sequence[Chart]) -> bool:
    """Whether any cell was measured on fewer videos than others."""
    return any(point.partial for chart in charts for point in chart.points)


def _figure(report: Report, chart: Chart, wide: Size) -> str:
    """A chart in light and dark colors, each for wide and for narrow screens."""

    def drawn(colors: Colors, size: Size) -> Figure:
        figure = new_figure(size)
        draw(add_axes(figure, left=36, right=8, bottom=40, top=26), report, chart, colors)
        return figure

    front = "; ".join(
        f"{SHORT[point.method]} {point.grid} px, {number(point.cost)} {chart.unit}, "
        f"{point.top1:.1f} %"
        for point in chart.front
    )
    alt = (
        f"Top-1 accuracy on the choosing split against {chart.unit} of {len(chart.points)} cells. "
        f"{front}"
    )
    if chart.cascades:
        cost, top1 = chart.cascades[-1]
        alt += f". The best cascade: {number(cost)} {chart.unit}, {top1:.1f} %"
    return card(chart.title, picture(alt, drawn, wide, NARROW, LIGHT, DARK))


# The drawing


def draw(axes: Axes, report: Report, chart: Chart, colors: dict[str, str]) -> None:
    """Draws a chart: its points, the line of its front, and the names of the grids on it."""
    _set_limits(axes, chart)
    is_log = axes.get_xscale() == "log"
    style(axes, colors, chart.unit + (", log scale" if is_log else ""), "top-1, %")
    ticks: Locator = LogLocator(subs=(1, 2, 5)) if is_log else MaxNLocator(5)
    if chart.unit == "tokens":
        ticks = FixedLocator(report["budgets"])
    axes.xaxis.set_major_locator(ticks)
    axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:,g}")
    axes.minorticks_off()
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="y", color=colors["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    front = chart.front
    axes.plot(*_coordinates(front), color=colors["quiet"], linewidth=1.5)
    if chart.cascades:
        axes.plot(
            *zip(*chart.cascades, strict=True),
            color=colors["warn"],
            linewidth=1.5,
            linestyle=(0, (4, 2)),
            marker=".",
            markersize=4,
            zorder=2.5,
        )
    for method, color in method_colors(colors).items():
        others = [p for p in chart.points if p.method == method and p not in front]
        small: Style = {"linestyle": "none", "marker": MARKERS[method], "markersize": 5.5}
        hollow: Style = {"markerfacecolor": "none", "markeredgecolor": color, "alpha": 0.6}
        full: Style = {"color": color, "markeredgecolor": "none", "alpha": 0.55}
        large: Style = {"color": color, "markeredgecolor": colors["card"], "markersize": 9.5}
        axes.plot(
            *_coordinates([p for p in others if p.partial]), **small | hollow, markeredgewidth=0.9
        )
        axes.plot(*_coordinates([p for p in others if not p.partial]), **small | full)
        axes.plot(
            *_coordinates([p for p in front if p.method == method]), **small | large, zorder=3
        )
    _name_front(axes, front, colors)


def _coordinates(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.cost for point in points], [point.top1 for point in points]


def _set_limits(axes: Axes, chart: Chart) -> None:
    """Limits with room around the points, and for the names of the front above and to the left."""
    costs, accuracies = _coordinates(chart.points)
    costs += [cost for cost, _ in chart.cascades]
    accuracies += [top1 for _, top1 in chart.cascades]
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


def _name_front(axes: Axes, front: Sequence[Point], colors: dict[str, str]) -> None:
    """Writes the front's grids above and to the left of their points, where no point can be.

    Of overlapping names, that of the more accurate point stays.
    """
    taken: list[tuple[float, float]] = []
    for point in reversed(front):
        x, y = axes.transData.transform((point.cost, point.top1)) * 72 / axes.figure.dpi
        if any(abs(x - left) < NAME and abs(y - below) < 12 for left, below in taken):
            continue
        taken.append((x, y))
        axes.annotate(
            point.grid,
            (point.cost, point.top1),
            (-4, 5),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=10,
            color=colors["ink"],
        )
