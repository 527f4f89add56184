"""The picture for slides: the charts above the heat maps, on a light background."""

import io
import math
import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fluxvit_jax.reports.wording import count
from fluxvit_jax.token_optimization.report import charts, heat_maps
from fluxvit_jax.token_optimization.report.charts import Chart
from fluxvit_jax.token_optimization.report.reading import METHODS, Report
from fluxvit_jax.token_optimization.report.style import LIGHT, MARKERS, method_colors

COLUMNS = 4
LEGIBLE = 14  # most frames or resolutions of a heat map
# Inches: of a panel, and of the gaps between two rows, above the first and on the left.
PANEL, GAP, TOP, LEFT = (4, 3.1), 1.25, 1.75, 0.55


def png(report: Report) -> bytes:
    """The picture as a PNG file."""
    drawn, heats = charts.charts_of(report), heat_maps.heat_maps_of(report)
    if max(len(report["frames"]), len(report["resolutions"])) > LEGIBLE:
        heats = []
    columns = min(COLUMNS, max(2, len(drawn), len(heats)))
    chart_rows, heat_rows = math.ceil(len(drawn) / columns), math.ceil(len(heats) / columns)
    rows = max(1, chart_rows + heat_rows)
    notes = textwrap.wrap(" ".join(report["notes"]), 56 * columns)
    foot = 0.65 + 0.2 * len(notes)
    width = PANEL[0] * columns + 0.4
    height = TOP + PANEL[1] * rows + GAP * (rows - 1) + foot
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    space = figure.add_gridspec(
        rows,
        columns,
        left=LEFT / width,
        right=1 - 0.2 / width,
        top=1 - TOP / height,
        bottom=foot / height,
        wspace=0.18,
        hspace=GAP / PANEL[1],
    )
    _write_texts(figure, report, notes)
    _draw_keys(figure, drawn)
    for i, chart in enumerate(drawn):
        axes = figure.add_subplot(space[i // columns, i % columns])
        charts.draw(axes, report, chart, LIGHT)
        _write_title(axes, chart.title)
    for i, heat in enumerate(heats):
        axes = figure.add_subplot(space[chart_rows + i // columns, i % columns])
        heat_maps.draw(axes, report, heat)
        _write_title(axes, f"TO at {count(heat.budget, 'token')}")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _write_texts(figure: Figure, report: Report, notes: Sequence[str]) -> None:
    """The title and the measured data at the top, the notes at the foot."""
    width, height = figure.get_size_inches()
    columns = int(width / PANEL[0])
    title = f"Token Optimization of FluxViT-{report['network']}"
    data = report["choose"].get("data", "the choosing split")
    facts = f"{report['views']} views, {report['dtype']}, top-1 on {data}"
    for text, y, size, weight, color in (
        (_cut(title, 22 * columns), height - 0.4, 16, "bold", "ink"),
        (_cut(facts, 44 * columns), height - 0.68, 10.5, "normal", "quiet"),
        *((line, 0.2 * i, 10.5, "normal", "ink") for i, line in enumerate(reversed(notes), 1)),
    ):
        figure.text(
            0.25 / width,
            y / height,
            text,
            fontsize=size,
            fontweight=weight,
            color=LIGHT[color],
            parse_math=False,
        )


def _draw_keys(figure: Figure, drawn: Sequence[Chart]) -> None:
    """A legend of the markers."""
    width, height = figure.get_size_inches()
    colors = method_colors(LIGHT)
    marker: charts.Style = {"linestyle": "none", "markersize": 7}
    keys = [
        Line2D([], [], marker=MARKERS[name], color=colors[name], label=METHODS[name], **marker)
        for name in charts.methods_in(drawn)
    ]
    keys.append(Line2D([], [], color=LIGHT["quiet"], linewidth=1.5, label="front"))
    if charts.has_partial(drawn):
        hollow: charts.Style = marker | {"marker": "o", "markerfacecolor": "none"}
        keys.append(Line2D([], [], color=LIGHT["quiet"], label="fewer videos", **hollow))
    figure.legend(
        handles=keys,
        loc="upper left",
        bbox_to_anchor=(0.25 / width, 1 - 0.82 / height),
        ncols=len(keys),
        frameon=False,
        fontsize=10.5,
        borderpad=0,
        borderaxespad=0,
        handletextpad=0.3,
    )


def _write_title(axes: Axes, title: str) -> None:
    axes.annotate(
        _cut(title, 35),
        (0, 1),
        (0, 27),
        xycoords="axes fraction",
        textcoords="offset points",
        va="bottom",
        fontsize=11,
        fontweight="bold",
        color=LIGHT["ink"],
        parse_math=False,
    )


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 3] + "..."
