"""What the pages of evaluations share: style, budgets, unreadable videos, tables as CSV."""

import csv
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from fluxvit_jax.reports import style
from fluxvit_jax.reports.elements import fact, folded, row, small, table
from fluxvit_jax.reports.wording import count

SHOWN = 20  # rows of a table that are not folded

CSS = (
    style.colors(style.LIGHT, style.DARK)
    + style.BASE
    + style.ELEMENTS
    + """
.whisker { color: var(--accent); background: var(--line); border-radius: 1rem; }
.whisker { height: 0.375rem; min-width: 5rem; }
.rows td:last-child, .rows th:last-child { padding-right: 0; }
.rows td, .rows th { padding-top: 0.4rem; padding-bottom: 0.4rem; }
.all td, .all thead th { text-align: left; }
@media (max-width: 48rem) {
  .rows { font-size: 0.8125rem; }
  .rows td, .rows th { padding-right: 0.5rem; }
}
"""
)


def csv_text(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    content = io.StringIO(newline="")
    csv.writer(content, lineterminator="\n").writerows([header, *rows])
    return content.getvalue()


def tokens_text(budget: str) -> str:
    """A budget in words, or the name of what is in its place."""
    return count(int(budget), "token") if budget.isdecimal() else budget


def budget_text(budget: str, setting: Mapping[str, Any] | None) -> str:
    """A budget with the grid of its setting, if that is known."""
    grid = ""
    if setting and "frames" in setting:
        grid = f"{setting['frames']} frames of {setting['resolution']} px"
    return f'<span class="value">{tokens_text(budget)}</span>{small(grid)}'


def data_fact(data: str, videos: int, failed: int) -> str:
    """The videos of an evaluation, and how many of them could not be read."""
    read = f"{failed:,} could not be read" if failed else "all could be read"
    return fact(data, f"{count(videos, 'video')}, {read}")


def failures(report: Mapping[str, Any]) -> str:
    """The folded list of unreadable videos of a report; nothing if there are none."""
    rows = [
        row(html.escape(one["id"]), (html.escape(one["reason"]),))
        for one in report.get("failures", [])
    ]
    title = f"{count(len(rows), 'video')} could not be read"
    return folded(title, table("all", ("Video", "Reason"), rows)) if rows else ""
