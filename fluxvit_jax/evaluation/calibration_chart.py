"""Reliability diagrams on the page of an evaluation: accuracy against confidence, by budget."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from fluxvit_jax.evaluation.page_parts import tokens_text
from fluxvit_jax.reports.charts import Colors, Size, add_axes, card, new_figure, picture, style
from fluxvit_jax.reports.confidence_intervals import share_interval
from fluxvit_jax.reports.elements import folded, row, section, side_by_side, table
from fluxvit_jax.reports.wording import percent

WIDE, NARROW = (600, 440), (380, 340)  # pixels
LARGEST, SMALLEST = 320, 14  # area in square points of the dot of the fullest bin, and of any

LEGEND = """Videos in bins by confidence, the probability of the likeliest class. A dot's area is
the number of its videos, the line through it the 95 % interval (Wilson) of their accuracy. On the
diagonal, accuracy is confidence; below it the network is overconfident. ECE, the expected
calibration error, is the mean distance from the diagonal over videos. Probabilities softmax(log p /
T) with the temperature T have the least cross entropy. The ECE at a temperature is of each half of
the videos with T fitted to the other half. Videos that could not be read are left out."""

Measured = Mapping[str, Mapping[str, Any]]  # budget -> what `calibration.measure` found


def calibration_section(report: Mapping[str, Any]) -> str:
    """The section of an evaluation's page; nothing if the report knows no calibration."""
    measured = {
        budget: own["calibration"]
        for budget, own in report.get("budgets", {}).items()
        if "calibration" in own
    }
    if not measured:
        return ""
    cards = [f'<div class="card">{_numbers(measured)}</div>\n']
    cards += [_diagram(budget, own) for budget, own in measured.items()]
    return section("Calibration", LEGEND, side_by_side(cards) + _bins(measured))


def _numbers(measured: Measured) -> str:
    rows = []
    for budget, own in measured.items():
        texts = (
            tokens_text(budget),
            percent(own["ece"]),
            f"{own['temperature']:.2f}",
            percent(own["ece_at_temperature"]),
        )
        head, *columns = (f'<span class="value">{text}</span>' for text in texts)
        rows.append(row(head, columns))
    return table("rows", ("Tokens", "ECE", "Temperature", "ECE at a temperature"), rows)


def _diagram(budget: str, measured: Mapping[str, Any]) -> str:
    bins, ece = measured["bins"], percent(measured["ece"])
    dots = [
        (100 * confidence, 100 * accuracy, n, share_interval(round(accuracy * n), n))
        for n, confidence, accuracy in zip(
            bins["count"], bins["confidence"], bins["accuracy"], strict=True
        )
        if n
    ]

    def draw(colors: Colors, size: Size) -> Figure:
        figure = new_figure(size)
        axes = add_axes(figure, left=36, right=16, bottom=42, top=28)
        style(axes, colors, "confidence, %", "accuracy, %")
        axes.plot((0, 100), (0, 100), color=colors["quiet"], linewidth=1, linestyle=(0, (4, 4)))
        across, up, videos, ends = zip(*dots, strict=True)
        axes.vlines(
            across,
            [100 * low for low, _ in ends],
            [100 * high for _, high in ends],
            color=colors["quiet"],
            linewidth=1.5,
        )
        areas = [max(SMALLEST, LARGEST * n / max(videos)) for n in videos]
        axes.scatter(across, up, areas, color=colors["accent"], zorder=3, clip_on=False)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        axes.grid(axis="y", color=colors["line"], linewidth=0.8)
        axes.set_axisbelow(True)
        return figure

    name = tokens_text(budget)
    points = "; ".join(f"{up:.0f} % right at {across:.0f} %" for across, up, *_ in dots)
    return card(f"{name}: ECE {ece}", picture(f"{name}: {points}", draw, WIDE, NARROW))


def _bins(measured: Measured) -> str:
    """The folded table of all bins, with the numbers of the diagrams."""
    rows, bins = [], len(next(iter(measured.values()))["bins"]["count"])
    for number in range(bins):
        columns: list[str] = []
        for own in measured.values():
            n, *shares = (own["bins"][k][number] for k in ("count", "confidence", "accuracy"))
            columns += [f"{n:,}", *(percent(share) if n else "&ndash;" for share in shares)]
        rows.append(row(f"to {percent((number + 1) / bins)}", columns))
    budgets = "".join(
        f'<th scope="colgroup" colspan="3">{tokens_text(budget)}</th>' for budget in measured
    )
    heads = ("Confidence", *("Videos", "Mean", "Accuracy") * len(measured))
    content = table("all", heads, rows, above=f"<tr><td></td>{budgets}</tr>")
    return folded("All bins of confidence", content)
