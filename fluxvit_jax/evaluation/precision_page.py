"""The page of an evaluation with several labels a video, and its table as a CSV file."""

import html
from collections.abc import Sequence
from typing import Any

from etils import epath

from fluxvit_jax.distributed import atomic
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation.page_parts import (
    CSS,
    SHOWN,
    budget_text,
    csv_text,
    data_fact,
    failures,
    tokens_text,
)
from fluxvit_jax.reports.elements import (
    document,
    fact,
    facts,
    folded,
    notes,
    row,
    section,
    small,
    table,
)
from fluxvit_jax.reports.spreadsheet import cell
from fluxvit_jax.reports.wording import percent

BUDGETS_LEGEND = """Mean over the classes that have videos of the average precision (mAP), as
scikit-learn defines it. Videos that could not be read count as not found."""
CLASSES_LEGEND = """Average precision of each class at {budget}, the lowest first. Classes without
videos are left out."""


def write(path: epath.Path, report: dict[str, Any]) -> epath.Path:
    """Writes `NAME.html` and `NAME.classes.csv`; returns the path of the page.

    path: of NAME in its folder; report: the content of `NAME.json`, see `evaluate.Evaluation`.

    Raises UserError if the report is damaged, OSError if a file cannot be written.
    """
    page = path.with_name(f"{path.name}.html")
    try:
        texts = _classes_csv(report), _page(report)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}.json: is no report of an evaluation: {error!r}") from error
    atomic.write(path.with_name(f"{path.name}.classes.csv"), texts[0])
    atomic.write(page, texts[1])
    return page


def _classes_csv(report: dict[str, Any]) -> str:
    """A row per class: its videos, and its average precision at each budget."""
    budgets = report["budgets"]
    header = ["class", "name", "videos", *(f"ap_{budget}" for budget in budgets)]
    rows = []
    for i, (name, videos) in enumerate(_classes(report)):
        precisions = (own["ap"][i] for own in budgets.values())
        texts = ("" if one is None else f"{one:.6f}" for one in precisions)
        rows.append([i, cell(name), videos, *texts])
    return csv_text(header, rows)


def _classes(report: dict[str, Any]) -> list[tuple[str, int]]:
    """The name and the number of videos of each class."""
    return list(zip(report["class_names"], report["videos_of_class"], strict=True))


def _page(report: dict[str, Any]) -> str:
    videos, failed = report["dataset"]["videos"], len(report["failures"])
    known = {
        "Data": data_fact(report["data"], videos, failed),
        "Classes": fact(f"{len(report['class_names']):,}", "a video may have several, or none"),
        "Views, clips x crops": fact(report["views"]),
    }
    remarks = notes([report["warning"]] if report["warning"] else [])
    title = f"Evaluation of {report['checkpoint']}"
    sections = _budgets(report) + _precisions(report) + failures(report)
    return document(title, CSS, remarks + facts(known), sections)


def _budgets(report: dict[str, Any]) -> str:
    rows = [
        row(budget_text(budget, own), (f'<span class="value">{percent(own["map"])}</span>',))
        for budget, own in report["budgets"].items()
    ]
    content = f'<div class="card">{table("rows", ("Tokens", "mAP"), rows)}</div>\n'
    return section("Mean average precision by budget", BUDGETS_LEGEND, content)


def _precisions(report: dict[str, Any]) -> str:
    """The classes of the lowest precision; where they are more, all of them are folded."""
    classes, budgets = _classes(report), report["budgets"]
    main = next(iter(budgets.values()))["ap"]
    order = sorted((i for i, (_, videos) in enumerate(classes) if videos), key=main.__getitem__)

    def rows(numbers: Sequence[int]) -> list[str]:
        return [
            row(
                html.escape(classes[i][0]) + small(f"class {i}"),
                (f"{classes[i][1]:,}", *(percent(own["ap"][i]) for own in budgets.values())),
            )
            for i in numbers
        ]

    heads = ("Class", "Videos", *map(tokens_text, budgets))
    content = f'<div class="card">{table("rows", heads, rows(order[:SHOWN]))}</div>\n'
    title = "Classes"
    if len(order) > SHOWN:
        title = f"The {SHOWN} classes of the lowest precision"
        content += folded(f"All {len(order):,} classes", table("all", heads, rows(order)))
    return section(title, CLASSES_LEGEND.format(budget=tokens_text(next(iter(budgets)))), content)
