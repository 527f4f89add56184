"""The timeline of a video that was predicted in windows: its plot on the page, and its segments."""

import html
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from fluxvit_jax.reports import style
from fluxvit_jax.reports.charts import Colors, Size, add_axes, new_figure, picture
from fluxvit_jax.reports.charts import style as style_axes
from fluxvit_jax.reports.elements import row, table
from fluxvit_jax.reports.wording import count, percent

WIDE, NARROW = (1000, 260), (380, 260)  # pixels of a plot
# Of the classes' lines, told apart with any color vision (after Okabe and Ito).
LIGHT = ("#3569d4", "#c9540a", "#0b8a68", "#a6237e", "#8a6d00", "#5b6472")
DARK = ("#7aa6ff", "#ff9d5c", "#3fcfa4", "#f08fd0", "#e6c84f", "#b4bcc8")

LEGEND = """The probability of each class over the video, in windows that move along it: a point is
the middle of a window. Shown are the classes that are the likeliest most often. Below are
successive windows of one class with its mean probability."""


def _named(colors: Sequence[str]) -> dict[str, str]:
    return {f"line{i}": color for i, color in enumerate(colors)}


CSS = (
    style.colors(style.LIGHT | _named(LIGHT), style.DARK | _named(DARK))
    + """
.timelines { display: grid; gap: 1rem; margin-bottom: 1.5rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 0.75rem; }
.card { padding: 1rem; min-width: 0; }
.card h3 { font-size: 1rem; margin-bottom: 0.5rem; }
.keys { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; font-size: 0.875rem; }
.segments { max-height: 20rem; overflow: auto; margin-top: 0.75rem; font-size: 0.875rem; }
.segments table { border-collapse: collapse; }
.segments th { text-align: left; font-weight: 400; white-space: nowrap; }
.segments th, .segments td { padding: 0.15rem 1rem 0.15rem 0; }
.segments thead th { color: var(--quiet); }
"""
)


class Moment(NamedTuple):
    """What the network says of a window; times in seconds.

    top: classes with their probabilities, likeliest first, without those too improbable to be seen
    in a plot; empty after a failure, the reason why the window cannot be read.
    """

    start: float
    end: float
    top: Sequence[tuple[str, float]]
    failure: str = ""


class Timeline(NamedTuple):
    """The windows of a video at one setting."""

    budget: int
    frames: int
    resolution: int
    head: int
    moments: list[Moment]


def section(timelines: Sequence[Timeline]) -> str:
    """The part of the page: a plot and the segments of each setting."""
    cards = "".join(map(_card, timelines))
    return f'<p class="legend">{LEGEND}</p>\n<div class="timelines">\n{cards}</div>\n'


def _card(timeline: Timeline) -> str:
    classes = _shown(timeline.moments)
    title = f"{count(timeline.budget, 'token')}, {count(len(timeline.moments), 'window')}"
    keys = "".join(
        f'<span><span style="color:var(--line{i})">&#9632;</span> {html.escape(name)}</span>'
        for i, name in enumerate(classes)
    )

    def draw(colors: Colors, size: Size) -> Figure:
        figure = new_figure(size)
        axes = add_axes(figure, left=36, right=16, bottom=42, top=28)
        style_axes(axes, colors, "seconds", "probability, %")
        moments = timeline.moments
        middles = [(moment.start + moment.end) / 2 for moment in moments]
        lines = DARK if colors is style.DARK else LIGHT
        for color, name in zip(lines, classes, strict=False):
            # Windows that cannot be read interrupt the line.
            known = [100 * dict(own.top).get(name, 0) if own.top else np.nan for own in moments]
            axes.plot(middles, known, color=color, linewidth=1.75, marker="o", markersize=3)
        axes.set_xlim(0, moments[-1].end)
        axes.set_ylim(-3, 103)
        axes.grid(axis="y", color=colors["line"], linewidth=0.8)
        axes.set_axisbelow(True)
        return figure

    alt = "; ".join(f"{_span(*own[:2])}: {own[2]}" for own in segments(timeline.moments))
    rows = [
        row(_span(start, end), (html.escape(name), percent(mean)))
        for start, end, name, mean in segments(timeline.moments)
    ]
    heads = ("Seconds", "Likeliest class", "Probability")
    return (
        f'<div class="card"><h3>{title}</h3>\n<p class="keys">{keys}</p>\n'
        + picture(alt, draw, WIDE, NARROW)
        + f'<div class="segments">{table("", heads, rows)}</div></div>\n'
    )


def _shown(moments: Sequence[Moment]) -> list[str]:
    """The classes that are the likeliest most often, then the most probable ones."""
    often = Counter(moment.top[0][0] for moment in moments if moment.top)
    total: Counter[str] = Counter()
    for moment in moments:
        total.update(dict(moment.top))
    order = sorted(total, key=lambda name: (-often[name], -total[name], name))
    return order[: len(LIGHT)]


def segments(moments: Sequence[Moment]) -> list[tuple[float, float, str, float]]:
    """(start, end, class, mean probability) of successive windows with the same likeliest class.

    Windows that cannot be read belong to none.
    """
    runs = groupby(moments, lambda moment: moment.top[0][0] if moment.top else "")
    found = []
    for name, own in ((name, list(run)) for name, run in runs):
        if own[0].top:
            mean = float(np.mean([moment.top[0][1] for moment in own]))
            found.append((own[0].start, own[-1].end, name, mean))
    return found


def _span(start: float, end: float) -> str:
    return f"{start:.1f} to {end:.1f}"
