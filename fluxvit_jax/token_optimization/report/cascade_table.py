"""The section of cascades: what each costs on average, how accurate it is, and who stops where."""

import html
import math
from typing import Any

from fluxvit_jax.reports.elements import folded, row, section, small, table
from fluxvit_jax.reports.wording import count, interval, number, percent, points
from fluxvit_jax.token_optimization.report.reading import Report, cascade_milliseconds

SHOWN = 10  # cascades that are not folded away
LEGEND = """A cascade asks every video at a few tokens, and again at more only if the answer is in
doubt. GFLOPs and milliseconds are means of all videos, all views of a video, passes that were in
vain counted. Thresholds, temperatures and order were chosen on the choosing split, which flatters
them: a cascade is here if its accuracy there, less a standard error, is above that of all that cost
no more. The gain is over the best single cell for as many GFLOPs, paired over the videos of the
reporting split."""


def text(report: Report) -> str:
    """The section; nothing without cascades of several steps."""
    shown = {name: own for name, own in report["cascades"].items() if len(own["steps"]) > 1}
    if not shown:
        return ""
    heads = ["Cascade", "Steps", "Go on", "GFLOPs"]
    heads += [f"ms, {html.escape(device)}" for device in report["devices"]]
    heads += ["Top-1, choosing split", "Top-1, reporting split", "Gain, points", "Over"]
    rows = [row(name, _columns(report, own)) for name, own in shown.items()]
    best = max(shown, key=lambda name: shown[name]["choose"]["credited"])
    every = math.ceil(len(rows) / SHOWN)
    few = table("rows costs", heads, rows[::-1][::every][::-1])  # the dearest among them
    content = f'<div class="card sideways">{few}</div>\n'
    if every > 1:
        content += folded(f"All {count(len(rows), 'cascade')}", table("all", heads, rows))
    return section("Cascades", LEGEND, content + _by_class(best, shown[best]))


def _columns(report: Report, own: dict[str, Any]) -> list[str]:
    choose, reported = own["choose"], own["report"]
    gain = "&ndash;"
    if own["over"]:
        low, high = own["over"]["interval"]
        kind = "better" if low > 0 else "worse" if high < 0 else ""
        value = f'<span class="{kind}">{points(own["over"]["top1"])}</span>'
        gain = value + small(f"{points(low)} to {points(high)}")
    return [
        "<br>".join(_step(step) for step in own["steps"]) + small(f"by {own['confidence']}"),
        ", ".join(percent(share) for share in choose["reached"][1:]),
        number(choose["average_gflops"]),
        *(number(cascade_milliseconds(report, own, device)) for device in report["devices"]),
        percent(choose["top1"]),
        percent(reported["top1"]) + small(interval(reported["top1_interval"])),
        gain,
        html.escape(own["over"]["cell"]) if own["over"] else "&ndash;",
    ]


def _step(step: dict[str, Any]) -> str:
    views = f", {count(step['views'], 'view')}" if step["views"] else ""
    threshold = "" if step["threshold"] is None else f", sure from {step['threshold']:.3f}"
    return f"{step['budget']} of {step['frames']}x{step['resolution']}{views}{threshold}"


def _by_class(name: str, own: dict[str, Any]) -> str:
    """How many videos of each class stop at each step of the most accurate cascade."""
    heads = ["Class", *(f"Stop at step {n}" for n in range(1, len(own["steps"]) + 1))]
    rows = [
        row(f"class {label}", map(str, stopped))
        for label, stopped in own["stopped_by_class"].items()
    ]
    title = f"{name}, the most accurate on the choosing split: where videos of each class stop"
    return folded(f"{title} (reporting split)", table("all", heads, rows))
