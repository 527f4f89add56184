"""Heat maps of accuracy by frames and resolution, one per budget, for the page and the picture."""

import math
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from fluxvit_jax.grids import Grid
from fluxvit_jax.reports import elements
from fluxvit_jax.reports.charts import style
from fluxvit_jax.reports.wording import count
from fluxvit_jax.token_optimization.report.reading import (
    SHORT,
    Cell,
    Report,
    complete_cells,
    grid,
    measured_cells,
)
from fluxvit_jax.token_optimization.report.style import HEAT, LIGHT

GridSize = tuple[int, int]  # frames, resolution

LEGEND = """Top-1 accuracy of TO on the choosing split in percent, of the best head. Rows are
frames, columns pixels of a side. In each table the color goes from its worst grid to its best,
which is framed. Empty grids have too few tokens for the budget; a dot is a grid that was not
measured; <i>quiet italics</i> are of fewer videos. A grid of just as many tokens as the budget is
plain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """Accuracies of TO on each grid at a budget.

    cells: those of the best head; plain where a grid has as many tokens as the budget.
    heats: percent of the accent color, of the grids measured on all videos; best: the best of them.
    """

    budget: int
    cells: dict[GridSize, Cell]
    heats: dict[GridSize, float]
    best: GridSize | None


def heat_maps_of(report: Report) -> list[HeatMap]:
    """The heat map of each budget with measured cells."""
    maps = [_heat_map(report, budget) for budget in report["budgets"]]
    return [heat_map for heat_map in maps if heat_map.cells]


def _heat_map(report: Report, budget: int) -> HeatMap:
    def at_budget(cells: dict[str, Cell]) -> list[tuple[GridSize, Cell]]:
        """By grid; the best cells come last, so that a dict keeps the best of a grid's heads."""
        return [
            ((cell["frames"], cell["resolution"]), cell)
            for cell in cells.values()
            if cell["budget"] == budget and cell["method"] != "merge"
        ]

    complete = at_budget(complete_cells(report))
    top1: dict[GridSize, float] = {size: cell["choose"]["top1"] for size, cell in complete}
    low, high = min(top1.values(), default=0), max(top1.values(), default=0)
    cold, hot = HEAT
    return HeatMap(
        budget=budget,
        cells=dict(at_budget(measured_cells(report))),
        heats={
            size: cold + (hot - cold) * ((value - low) / (high - low) if high > low else 1)
            for size, value in top1.items()
        },
        best=complete[-1][0] if complete else None,
    )


# The page


def section(report: Report) -> str:
    """The heat maps of all budgets."""
    tables = [_table(report, heat_map) for heat_map in heat_maps_of(report)]
    content = elements.side_by_side(tables)
    return elements.section("Frames and resolution", LEGEND, content) if tables else ""


def _table(report: Report, heat_map: HeatMap) -> str:
    rows = []
    for t in report["frames"]:
        cells = "".join(_cell(heat_map, (t, side)) for side in report["resolutions"])
        rows.append(f'<tr><th scope="row">{t}</th>{cells}</tr>\n')
    content = elements.table("heat", ("", *report["resolutions"]), rows)
    return f'<div class="card"><h3>{count(heat_map.budget, "token")}</h3>\n{content}</div>\n'


def _cell(heat_map: HeatMap, size: GridSize) -> str:
    cell = heat_map.cells.get(size)
    if not cell:
        fills_budget = Grid.square(*size).tokens >= heat_map.budget
        return f"<td>{'&middot;' if fills_budget else ''}</td>"
    choose = cell["choose"]
    title = f"{SHORT[cell['method']]} {grid(cell)} px, head {cell['head']}"
    title += f", {count(choose['videos'], 'video')}"
    kind, heat = "partial", ""
    if size in heat_map.heats:
        kind = "known best" if size == heat_map.best else "known"
        heat = f' style="--heat:{heat_map.heats[size]:.0f}%"'
    return f'<td class="{kind}" title="{title}"{heat}>{100 * choose["top1"]:.1f}</td>'


# The picture


def draw(axes: Axes, report: Report, heat_map: HeatMap) -> None:
    """Draws a heat map in light colors."""
    frames, resolutions = report["frames"], report["resolutions"]
    shares = [[heat_map.heats.get((t, side), math.nan) for side in resolutions] for t in frames]
    colors = LinearSegmentedColormap.from_list("accent", (LIGHT["card"], LIGHT["accent"]))
    axes.imshow(shares, cmap=colors, vmin=0, vmax=100, aspect="auto")
    for size, cell in heat_map.cells.items():
        column, row = resolutions.index(size[1]), frames.index(size[0])
        is_partial, is_best = size not in heat_map.heats, size == heat_map.best
        axes.text(
            column,
            row,
            f"{100 * cell['choose']['top1']:.1f}",
            ha="center",
            va="center",
            fontsize=9,
            color=LIGHT["quiet" if is_partial else "ink"],
            fontstyle="italic" if is_partial else "normal",
            fontweight="bold" if is_best else "normal",
        )
        if is_best:
            corner = column - 0.5, row - 0.5
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=LIGHT["ink"], lw=1.5))
    style(axes, LIGHT, "pixels of a side", "frames")
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks(range(len(resolutions)), resolutions)
    axes.set_yticks(range(len(frames)), frames)
