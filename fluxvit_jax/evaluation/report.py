"""What people look at after an evaluation: a page, its tables as CSV files, the matrix as a PNG.

All are made from `NAME.predictions.jsonl`, without running the network. `--mode=evaluate` does so;
for an evaluation that was made before:

    python -m fluxvit_jax.evaluation.report runs/mine/evaluation/NAME.predictions.jsonl
"""

import argparse
import html
import sys
from collections.abc import Sequence

import numpy as np
from etils import epath
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fluxvit_jax.distributed import atomic, storage
from fluxvit_jax.errors import ArgumentParser, UserError
from fluxvit_jax.evaluation import confusion_chart, precision_page
from fluxvit_jax.evaluation.calibration_chart import calibration_section
from fluxvit_jax.evaluation.page_parts import (
    CSS,
    SHOWN,
    budget_text,
    csv_text,
    data_fact,
    failures,
    tokens_text,
)
from fluxvit_jax.evaluation.results import (
    SUFFIX,
    TOP,
    Results,
    confidently_wrong,
    confused_pairs,
    read,
    read_report,
)
from fluxvit_jax.reports.charts import Colors, Size, add_axes, card, new_figure, picture
from fluxvit_jax.reports.charts import style as style_axes
from fluxvit_jax.reports.confidence_intervals import share_interval
from fluxvit_jax.reports.elements import (
    document,
    fact,
    facts,
    folded,
    notes,
    row,
    section,
    side_by_side,
    small,
    table,
)
from fluxvit_jax.reports.spreadsheet import cell
from fluxvit_jax.reports.wording import count, interval, percent

BUDGETS_LEGEND = """Share of the videos whose class is the likeliest one (top-1), with its 95 %
interval (Wilson). Videos that could not be read count as wrong."""
CLASSES_LEGEND = """Top-1 accuracy of the videos of each class at {budget}, the lowest first, with
its 95 % interval, and the class that is most often predicted instead."""
CONFUSION_LEGEND = """At {budget}. Rows are true classes, columns predicted ones; the color is the
share of the class's videos, by its square root, so that rare confusions are seen. The diagonal is
right. All numbers are in <code>{file}</code>."""
WRONG_LEGEND = """Wrong at {budget} with the highest probability of the predicted class: often these
are wrong labels. The probability is the mean over the video's views."""


def write(predictions: storage.PathLike) -> epath.Path:
    """Writes the files beside `NAME.predictions.jsonl`; returns the path of the page.

    `NAME.html`, `NAME.classes.csv`, `NAME.confusion.csv` and `NAME.confusion.png`; of several
    labels a video only the first two, with other contents, from `NAME.json`.

    Raises UserError if the predictions cannot be read, OSError if a file cannot be written.
    """
    path = storage.path_of(predictions)
    name = path.name.removesuffix(SUFFIX)
    report = read_report(path)
    if report.get("multi_label"):
        return precision_page.write(path.with_name(name), report)
    results = read(predictions)
    confusion = results.confusion(results.main)
    page = path.with_name(f"{name}.html")
    atomic.write(path.with_name(f"{name}.classes.csv"), _classes_csv(results))
    atomic.write(path.with_name(f"{name}.confusion.csv"), _confusion_csv(results, confusion))
    matrix = confusion_chart.png(confusion, results.class_names)
    atomic.write(path.with_name(f"{name}.confusion.png"), matrix)
    atomic.write(page, _page(results, confusion, name))
    return page


# ---------------------------------------------------------------------------------------------
# Tables as files


def _classes_csv(results: Results) -> str:
    """A row per class: its videos, and top-1 with its interval at each budget."""
    keys = ("top1", "top1_low", "top1_high")
    header = ["class", "name", "videos"]
    header += [f"{key}_{budget}" for budget in results.tops for key in keys]
    videos = results.videos_of_class()
    right = [results.right_of_class(budget) for budget in results.tops]
    rows = []
    for i, name in enumerate(results.class_names):
        shares: list[str] = []
        for own in right:
            known = [own[i] / videos[i], *share_interval(own[i], videos[i])] if videos[i] else []
            shares += [f"{share:.6f}" for share in known] or [""] * len(keys)
        rows.append([i, cell(name), videos[i], *shares])
    return csv_text(header, rows)


def _confusion_csv(results: Results, confusion: np.ndarray) -> str:
    """A row per class, a column per predicted class, and one of videos that could not be read."""
    names = [cell(name) for name in results.class_names]
    rows = [[name, *row] for name, row in zip(names, confusion.tolist(), strict=True)]
    return csv_text(["true class", *names, "could not be read"], rows)


# ---------------------------------------------------------------------------------------------
# The page


def _page(results: Results, confusion: np.ndarray, name: str) -> str:
    report = results.report
    remarks = [report["warning"]] if report.get("warning") else []
    sections = (
        _budgets(results),
        _confusion(results, confusion, name),
        _classes(results, confusion),
        _mistakes(results),
        calibration_section(report),
        failures(results.report),
    )
    title = f"Evaluation of {report.get('checkpoint', name)}"
    return document(title, CSS, notes(remarks) + _facts(results, name), "".join(sections))


def _facts(results: Results, name: str) -> str:
    report, failed = results.report, len(results.ids) - sum(map(bool, results.tops[results.main]))
    known = {
        "Data": data_fact(report.get("data", name), len(results.ids), failed),
        "Classes": fact(f"{len(results.class_names):,}"),
    }
    if "views" in report:
        known["Views, clips x crops"] = fact(report["views"])
    if report.get("plan"):
        known["Settings of the search"] = fact(report["plan"])
    return facts(known)


def _budgets(results: Results) -> str:
    has_top5 = len(results.class_names) > TOP
    settings, rows = results.report.get("budgets", {}), []
    for budget in results.tops:
        tokens = budget_text(budget, settings.get(budget))
        columns = [_accuracy(results.right(budget))]
        if has_top5:
            columns.append(_accuracy(results.right(budget, TOP)))
        rows.append(row(tokens, columns))
    heads = ["Tokens", "Top-1", *["Top-5"] * has_top5]
    cards = [f'<div class="card">{table("rows", heads, rows)}</div>\n']
    if len(results.tops) > 1:
        cards.append(_budgets_chart(results))
    return section("Accuracy by budget", BUDGETS_LEGEND, side_by_side(cards))


def _accuracy(right: np.ndarray) -> str:
    share = f'<span class="value">{percent(right.mean())}</span>'
    return share + _whisker(int(right.sum()), len(right))


def _whisker(right: int, videos: int) -> str:
    """A bar from 0 to 100 % with an interval and its middle, and the interval in words."""
    low, high = share_interval(right, videos)
    left, middle = 100 * low, 100 * right / videos
    return (
        f'<div class="whisker"><div style="left:{left:.1f}%;width:{100 * high - left:.1f}%"></div>'
        f'<div style="left:{middle:.1f}%"></div></div>' + small(interval((low, high)))
    )


def _budgets_chart(results: Results) -> str:
    """Top-1 against tokens, with intervals."""
    n = len(results.ids)
    budgets = sorted(results.tops, key=int)
    right = [int(results.right(budget).sum()) for budget in budgets]
    ends = [share_interval(own, n) for own in right]

    def draw(colors: Colors, size: Size) -> Figure:
        figure = new_figure(size)
        axes = add_axes(figure, left=36, right=24, bottom=42, top=28)
        style_axes(axes, colors, "tokens, log scale", "top-1, %")
        axes.set_xscale("log")
        tokens, top1 = [int(budget) for budget in budgets], [100 * own / n for own in right]
        below = [max(0, top - 100 * low) for top, (low, _) in zip(top1, ends, strict=True)]
        above = [max(0, 100 * high - top) for top, (_, high) in zip(top1, ends, strict=True)]
        axes.errorbar(
            tokens,
            top1,
            (below, above),
            color=colors["accent"],
            marker="o",
            ecolor=colors["quiet"],
            elinewidth=1.5,
            capsize=4,
        )
        axes.set_xticks(tokens, [f"{number:,}" for number in tokens])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="y", color=colors["line"], linewidth=0.8)
        axes.set_axisbelow(True)
        return figure

    points = (
        f"{tokens_text(b)}: {percent(own / n)}" for b, own in zip(budgets, right, strict=True)
    )
    return card("Top-1 against tokens", picture("; ".join(points), draw))


def _confusion(results: Results, confusion: np.ndarray, name: str) -> str:
    names = results.class_names
    matrix = confusion_chart.section_card(confusion, names)
    of_class = confusion.sum(1)
    rows = [
        row(
            html.escape(names[own]),
            (html.escape(names[taken]), f"{videos:,} of {of_class[own]:,}"),
        )
        for own, taken, videos in confused_pairs(confusion, SHOWN)
    ]
    pairs = table("rows", ("Class", "Taken for", "Videos"), rows) if rows else "<p>None.</p>"
    cards = [matrix, f'<div class="card"><h3>Most frequent confusions</h3>\n{pairs}</div>\n']
    file = html.escape(f"{name}.confusion.csv")
    legend = CONFUSION_LEGEND.format(budget=tokens_text(results.main), file=file)
    return section("Which classes are confused", legend, side_by_side(cards))


def _classes(results: Results, confusion: np.ndarray) -> str:
    """The least accurate classes; all classes at all budgets are folded."""
    main, videos = results.main, results.videos_of_class()
    right = {budget: results.right_of_class(budget) for budget in results.tops}
    known = np.flatnonzero(videos)
    shares = right[main][known] / videos[known]
    order = known[np.lexsort((known, shares))].tolist()
    pairs = confused_pairs(confusion, confusion.size)
    instead = {own: (taken, n) for own, taken, n in reversed(pairs)}

    def taken_for(i: int) -> str:
        if i not in instead:
            return "&ndash;"
        taken, n = instead[i]
        return html.escape(results.class_names[taken]) + small(count(n, "video"))

    def accuracy(i: int) -> str:
        n, own = int(videos[i]), int(right[main][i])
        return f'<span class="value">{percent(own / n)}</span>' + _whisker(own, n)

    def name(i: int) -> str:
        return html.escape(results.class_names[i])

    lowest = [
        row(name(i) + small(f"class {i}"), (f"{videos[i]:,}", accuracy(i), taken_for(i)))
        for i in order[:SHOWN]
    ]
    heads = ("Class", "Videos", "Top-1", "Most often taken for")
    content = f'<div class="card">{table("rows", heads, lowest)}</div>\n'
    if len(order) > SHOWN or len(results.tops) > 1:
        rows = [
            row(
                name(i),
                (f"{videos[i]:,}", *(percent(own[i] / videos[i]) for own in right.values())),
            )
            for i in order
        ]
        all_heads = ("Class", "Videos", *map(tokens_text, results.tops))
        title = f"All {len(order):,} classes at each budget"
        content += folded(title, table("all", all_heads, rows))
    title = "Classes" if len(order) <= SHOWN else f"The {SHOWN} least accurate classes"
    return section(title, CLASSES_LEGEND.format(budget=tokens_text(main)), content)


def _mistakes(results: Results) -> str:
    main, names, rows = results.main, results.class_names, []
    for i in confidently_wrong(results, main, SHOWN):
        label, top = int(results.labels[i]), results.tops[main][i]
        predicted, probability = top[0]
        of_label = next((p for c, p in top if c == label), None)
        of_label_text = "not among the likeliest" if of_label is None else percent(of_label)
        rows.append(
            row(
                html.escape(results.ids[i]),
                (
                    html.escape(names[label]) + small(of_label_text),
                    html.escape(names[predicted]) + small(percent(probability)),
                ),
            )
        )
    heads = ("Video", "True class", "Predicted class")
    content = table("rows", heads, rows) if rows else "<p>No video is wrong.</p>"
    legend = WRONG_LEGEND.format(budget=tokens_text(main))
    return section("Most confidently wrong", legend, f'<div class="card">{content}</div>\n')


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m fluxvit_jax.evaluation.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "predictions", metavar=f"NAME{SUFFIX}", help="of the folder evaluation in a workdir"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the page anew; returns the exit status: 2 for bad input, with one line on stderr."""
    try:
        print(f"written to {write(_arguments(argv).predictions)}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
