"""Plain and TO side by side, and what they cost."""

from typing import Any

import pytest

from tests.token_optimization.report.sample import (
    BUDGETS,
    DEVICES,
    METHODS,
    VIDEOS,
    percent,
    read,
    sample,
    words,
)


def test_plain_and_to_are_of_the_reporting_split_with_their_intervals(given, page):
    table = page.tables[0]
    assert len(table) == 1 + len(BUDGETS)
    for row, budget in zip(table[1:], BUDGETS, strict=True):
        chosen = given["chosen"][str(budget)]
        assert row[0] == f"{budget:,} tokens"
        for column, method in ((1, "plain"), (2, "select"), (4, "merge")):
            assert words(row[column]) == accuracy_words(given["cells"].get(chosen[method]))
        for column, kind in ((3, "gain"), (5, "over_merge")):
            assert words(row[column]) == gain_words(chosen[kind])


def accuracy_words(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "\u2013"
    own = cell["report"]
    low, high = map(percent, own["top1_interval"])
    grid = f"{cell['frames']} frames of {cell['resolution']} px, head {cell['head']}"
    return f"{percent(own['top1'])} % {low} to {high} % {grid}"


def gain_words(gain: dict[str, Any] | None) -> str:
    if gain is None:
        return "\u2013"
    top1, low, high = (f"{100 * value:+.1f}" for value in (gain["top1"], *gain["interval"]))
    return f"{top1} {low} to {high}, 20,000 videos"


def test_gains_are_coloured_where_their_interval_is_clear_of_zero(tmp_path):
    given = sample(budgets=(2048, 1024, 512))
    ends = {"2048": [0.01, 0.03], "1024": [-0.01, 0.01], "512": [-0.03, -0.01]}
    for budget, own in given["chosen"].items():
        own["over_merge"] = None
        own["gain"] = {"top1": sum(ends[budget]) / 2, "interval": ends[budget], "videos": 9}
    page = read(given, tmp_path)
    kinds = [own["class"] for own in page.elements["div"] if "class" in own]
    assert [kind for kind in kinds if kind in ("better", "even", "worse")] == [
        *("better", "even", "worse")
    ]
    assert [words(row[3])[:4] for row in page.tables[0][1:]] == ["+2.0", "+0.0", "-2.0"]


@pytest.mark.parametrize("chosen", [{}, dict.fromkeys((*METHODS, "gain", "over_merge"))])
def test_the_best_so_far_stands_where_nothing_was_chosen_and_says_so(tmp_path, chosen):
    given = sample()
    given["chosen"]["1024"] = chosen
    for cell in given["cells"].values():
        cell.pop("report", None)
    for row in read(given, tmp_path).tables[0][1:]:
        known = row[0] != "1,024 tokens"
        split = "choosing split" if known else "choosing split, so far"
        assert split in row[1]
        assert ("so far" in row[2]) != known
    best = max(
        cell["choose"]["top1"]
        for cell in given["cells"].values()
        if (cell["budget"], cell["method"]) == (1024, "select")
        if cell["choose"]["videos"] == VIDEOS
    )
    assert row[2].strip().startswith(f"{percent(best)} %")


def test_a_report_without_plain_cells(tmp_path):
    given = sample()
    for name in [name for name in given["cells"] if name.startswith("plain")]:
        del given["cells"][name]
    for own in given["chosen"].values():
        own["plain"] = own["gain"] = None
    page = read(given, tmp_path)
    assert [words(row[1]) for row in page.tables[0][1:]] == ["\u2013"] * len(BUDGETS)


def test_without_merging_nothing_is_said_of_it(tmp_path):
    given = sample()
    for name in [name for name in given["cells"] if name.startswith("merge")]:
        del given["cells"][name]
    for own in given["chosen"].values():
        own["merge"] = own["over_merge"] = None
    given["skipped"] = []
    page = read(given, tmp_path)
    assert "merging" not in page.text
    assert len(page.tables[0][0]) == 4


def test_costs_of_what_was_chosen_are_both_gflops_and_every_device(given, page):
    table = page.tables[1]
    assert table[0] == ["Tokens", "Method", "GFLOPs", *(f"ms, {device}" for device in DEVICES)]
    own = given["chosen"]["1024"]
    names = [own["plain"], own["select"], own["merge"]]
    shorts = ("plain", "TO", "merging")
    for row, name, short in zip(table[-3:], names, shorts, strict=True):
        cell = given["cells"][name]
        assert row[0] == "1,024"
        assert words(row[1]) == f"{short} {cell['frames']}x{cell['resolution']} px"
        assert words(row[2]) == f"{cell['gflops']:.1f} {cell['gflops_kept']:.1f} kept"
        slow = given["devices"][DEVICES[0]]["cells"][name]
        assert words(row[3]) == f"{slow['milliseconds']:.1f} p95 {slow['milliseconds_p95']:.1f}"
        fast = given["devices"][DEVICES[1]]["cells"][name]
        assert words(row[4]) == f"{fast['milliseconds']:.2f} p95 {fast['milliseconds_p95']:.2f}"


def test_a_plain_cell_of_fewer_tokens_than_the_budget_says_how_many(tmp_path):
    given = sample(budgets=(2048, 1024))
    given["chosen"]["2048"]["plain"] = given["chosen"]["1024"]["plain"]
    table = read(given, tmp_path).tables[0]
    assert [row[1].endswith(", 1,024 tokens") for row in table[1:]] == [True, False]
