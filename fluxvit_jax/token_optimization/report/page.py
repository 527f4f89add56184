"""The page: its heading and its sections."""

import html
from typing import Any

from fluxvit_jax.reports.elements import document, fact, facts, notes
from fluxvit_jax.reports.wording import count
from fluxvit_jax.token_optimization.report import (
    cascade_table,
    charts,
    comparison,
    heat_maps,
    lists,
)
from fluxvit_jax.token_optimization.report.reading import Report
from fluxvit_jax.token_optimization.report.style import CSS


def text(report: Report) -> str:
    """One HTML file that needs no other."""
    sections = (
        comparison.accuracies(report),
        comparison.prices(report),
        charts.section(report),
        cascade_table.text(report),
        heat_maps.section(report),
        lists.stopped(report),
        lists.everything(report),
    )
    title = f"Token Optimization of FluxViT-{report['network']}"
    return document(title, CSS, notes(report["notes"]) + _facts(report), "".join(sections))


def _facts(report: Report) -> str:
    stopped = len(report["skipped"])
    return facts(
        {
            "Checkpoint": fact(report["checkpoint"], f"computed in {html.escape(report['dtype'])}"),
            "Views, clips x crops": fact(report["views"]),
            "Searched": fact(
                count(len(report["cells"]), "cell"),
                f"{stopped:,} stopped early by halving" if stopped else "",
            ),
            "Chosen on": _split(report["choose"]),
            "Reported on": _split(report["report"]),
        }
    )


def _split(split: dict[str, Any]) -> str:
    if not split:
        return fact("not yet")
    failed = split.get("failed", 0)
    failures = f"{failed:,} of them failed and count as wrong" if failed else "none failed"
    return fact(split.get("data", "?"), f"{count(split.get('videos', 0), 'video')}, {failures}")
