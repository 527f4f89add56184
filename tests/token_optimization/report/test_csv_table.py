"""The file for spreadsheets."""

from fluxvit_jax.token_optimization import report
from tests.token_optimization.report.sample import METHODS, NASTY, csv_rows, sample


def test_csv_has_every_number_of_every_cell(tmp_path):
    given = sample(nasty=NASTY)
    report.write(given, tmp_path)
    found = {row["cell"]: row for row in csv_rows(tmp_path)}
    assert found.keys() == given["cells"].keys()
    stopped = {one["cell"]: str(one["videos"]) for one in given["skipped"]}
    for name, cell in given["cells"].items():
        row = found[name]
        for key in ("method", "budget", "tokens", "frames", "resolution", "head", "gflops_kept"):
            assert row[key] == str(cell[key])
        for split in ("choose", "report"):
            own = cell.get(split, {})
            for key in ("videos", "top1", "top5"):
                assert row[f"{split}_{key}"] == str(own.get(key, ""))
            for key in ("top1", "top5"):
                ends = [str(end) for end in own.get(f"{key}_interval", ("", ""))]
                assert [row[f"{split}_{key}_{end}"] for end in ("low", "high")] == ends
        ends = [str(end) for end in cell["behind"]["interval"]]
        assert [row["behind_low"], row["behind_high"]] == ends
        assert row["stopped_after_videos"] == stopped.get(name, "")
        for device, own in given["devices"].items():
            assert row[f"batch on {device}"] == "8"
            for key, value in own["cells"][name].items():
                assert row[f"{key} on {device}"] == str(value)


def test_csv_says_what_was_chosen_and_its_gains(given, folder):
    found = csv_rows(folder)
    chosen = {own[method] for own in given["chosen"].values() for method in METHODS}
    assert {row["cell"] for row in found if row["chosen"] == "yes"} == chosen - {None}
    gains = {row["cell"]: row["gain_top1"] for row in found if row["gain_top1"]}
    expected = {own["select"]: str(own["gain"]["top1"]) for own in given["chosen"].values()}
    assert gains == expected


def test_rows_are_in_one_order_however_the_search_went(given, folder, tmp_path):
    names = [row["cell"] for row in csv_rows(folder)]
    assert names[:3] == ["select-3072-8x280-h1", "select-3072-8x280-h2", "select-3072-8x336-h1"]
    report.write(given | {"cells": dict(reversed(given["cells"].items()))}, tmp_path)
    assert [row["cell"] for row in csv_rows(tmp_path)] == names


def test_csv_says_that_a_plain_cell_was_chosen_for_a_budget_that_it_nearly_fills(tmp_path):
    given = sample(budgets=(2048, 1024))
    name = given["chosen"]["1024"]["plain"]
    given["chosen"] = {"2048": {"plain": name}, "1024": None}
    report.write(given, tmp_path)
    assert [row["cell"] for row in csv_rows(tmp_path) if row["chosen"]] == [name]
