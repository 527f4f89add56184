"""The page: its heading and its sections."""

import html
from typing import Any

from fluxvit_jax.report import charts, comparison, heat_maps, lists
from fluxvit_jax.report.reading import Report
from fluxvit_jax.report.style import CSS
from fluxvit_jax.report.wording import count


def text(report: Report) -> str:
    """One HTML file that needs no other."""
    network = html.escape(f"FluxViT-{report['network']}")
    sections = (
        *(comparison.accuracies, comparison.prices, charts.section, heat_maps.section),
        *(lists.stopped, lists.everything),
    )
    body = "".join(section(report) for section in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Token Optimization of {network}</title>
<style>{CSS}</style>
</head>
<body>
<header>
<h1>Token Optimization of {network}</h1>
{_notes(report)}{_facts(report)}</header>
<main>
{body}</main>
</body>
</html>
"""


def _notes(report: Report) -> str:
    items = "".join(f"<li>{html.escape(note)}</li>\n" for note in report["notes"])
    return f'<ul class="notes">\n{items}</ul>\n' if items else ""


def _facts(report: Report) -> str:
    stopped = len(report["skipped"])
    facts = {
        "Checkpoint": _fact(report["checkpoint"], f"computed in {html.escape(report['dtype'])}"),
        "Views, clips x crops": _fact(report["views"]),
        "Searched": _fact(
            count(len(report["cells"]), "cell"),
            f"{stopped:,} stopped early by halving" if stopped else "",
        ),
        "Chosen on": _split(report["choose"]),
        "Reported on": _split(report["report"]),
    }
    items = "".join(f"<div><dt>{name}</dt>{fact}</div>\n" for name, fact in facts.items())
    return f'<dl class="facts card">\n{items}</dl>\n'


def _split(split: dict[str, Any]) -> str:
    if not split:
        return _fact("not yet")
    failed = split.get("failed", 0)
    failures = f"{failed:,} of them failed and count as wrong" if failed else "none failed"
    return _fact(split.get("data", "?"), f"{count(split.get('videos', 0), 'video')}, {failures}")


def _fact(fact: str, more: str = "") -> str:
    """A fact as text, and HTML that says more of it."""
    more = f'<dd class="small">{more}</dd>' if more else ""
    return f"<dd>{html.escape(fact)}</dd>{more}"
