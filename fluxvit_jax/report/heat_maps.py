"""Heat maps of frames and resolution, one a budget: for the page and for the picture."""

import math
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from fluxvit_jax.budgets import Grid
from fluxvit_jax.report import charts, elements
from fluxvit_jax.report.reading import SHORT, Cell, Report, measured, whole
from fluxvit_jax.report.style import HEAT, LIGHT
from fluxvit_jax.report.wording import count, grid

Place = tuple[int, int]  # frames, resolution

LEGEND = """Top-1 accuracy of TO on the choosing split in percent, of the best head. Rows are
frames, columns pixels of a side. In each table the colour goes from its worst grid to its best,
which is framed. Empty grids have too few tokens for the budget; a dot is a grid that was not
measured; <i>quiet italics</i> are of fewer videos. A grid of just as many tokens as the budget is
plain."""


class HeatMap(NamedTuple):
    """What TO makes of each grid at a budget.

    cells: of the best head; plain where a grid has as many tokens as the budget.
    heats: percent of the accent, of those measured on all videos. best: of these.
    """

    budget: int
    cells: dict[Place, Cell]
    heats: dict[Place, float]
    best: Place | None


def heat_maps_of(report: Report) -> list[HeatMap]:
    """The heat map of each budget that has one."""
    maps = [_heat_map(report, budget) for budget in report["budgets"]]
    return [one for one in maps if one.cells]


def _heat_map(report: Report, budget: int) -> HeatMap:
    known, sure = (  # the best come last, so that of the heads of a grid the best stays
        [
            ((cell["frames"], cell["resolution"]), cell)
            for cell in cells.values()
            if cell["budget"] == budget and cell["method"] != "merge"
        ]
        for cells in (measured(report), whole(report))
    )
    top1 = {place: cell["choose"]["top1"] for place, cell in sure}
    low, high = min(top1.values(), default=0), max(top1.values(), default=0)
    cold, hot = HEAT
    heats = {
        place: cold + (hot - cold) * ((own - low) / (high - low) if high > low else 1)
        for place, own in top1.items()
    }
    return HeatMap(budget, dict(known), heats, sure[-1][0] if sure else None)


# In the page.


def section(report: Report) -> str:
    """The heat maps of all budgets."""
    tables = [_table(report, one) for one in heat_maps_of(report)]
    content = elements.side_by_side(tables)
    return elements.section("Frames and resolution", LEGEND, content) if tables else ""


def _table(report: Report, own: HeatMap) -> str:
    rows = []
    for t in report["frames"]:
        cells = "".join(_cell(own, (t, side)) for side in report["resolutions"])
        rows.append(f'<tr><th scope="row">{t}</th>{cells}</tr>\n')
    content = elements.table("heat", ("", *report["resolutions"]), rows)
    return f'<div class="card"><h3>{count(own.budget, "token")}</h3>\n{content}</div>\n'


def _cell(own: HeatMap, place: Place) -> str:
    cell = own.cells.get(place)
    if not cell:
        frames, resolution = place
        fills = Grid.square(frames, resolution).tokens >= own.budget
        return f"<td>{'&middot;' if fills else ''}</td>"
    found = cell["choose"]
    title = f"{SHORT[cell['method']]} {grid(cell)} px, head {cell['head']}"
    title += f", {count(found['videos'], 'video')}"
    kind = "partial"
    if place in own.heats:
        kind = "known best" if place == own.best else "known"
    heat = f' style="--heat:{own.heats[place]:.0f}%"' if place in own.heats else ""
    return f'<td class="{kind}" title="{title}"{heat}>{100 * found["top1"]:.1f}</td>'


# In the picture.


def draw(axes: Axes, report: Report, own: HeatMap) -> None:
    """Draws a heat map in light colours."""
    frames, resolutions = report["frames"], report["resolutions"]
    shares = [[own.heats.get((t, side), math.nan) for side in resolutions] for t in frames]
    colours = LinearSegmentedColormap.from_list("accent", (LIGHT["card"], LIGHT["accent"]))
    axes.imshow(shares, cmap=colours, vmin=0, vmax=100, aspect="auto")
    for place, cell in own.cells.items():
        column, row = resolutions.index(place[1]), frames.index(place[0])
        is_partial, is_best = place not in own.heats, place == own.best
        axes.text(
            *(column, row, f"{100 * cell['choose']['top1']:.1f}"),
            **{"ha": "center", "va": "center", "fontsize": 9},
            color=LIGHT["quiet" if is_partial else "ink"],
            fontstyle="italic" if is_partial else "normal",
            fontweight="bold" if is_best else "normal",
        )
        if is_best:
            corner = column - 0.5, row - 0.5
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=LIGHT["ink"], lw=1.5))
    charts.style(axes, LIGHT, "pixels of a side", "frames")
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks(range(len(resolutions)), resolutions)
    axes.set_yticks(range(len(frames)), frames)
