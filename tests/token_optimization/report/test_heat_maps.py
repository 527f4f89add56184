"""Heat maps of frames and resolution."""

import numpy as np

from tests.token_optimization.report.sample import (
    BUDGETS,
    FRAMES,
    RESOLUTIONS,
    VIDEOS,
    accuracy,
    percent,
    read,
    sample,
)


def test_heat_maps_have_the_best_head_of_each_grid_and_frame_the_best(given, page):
    for budget, table, kinds in zip(BUDGETS, page.tables[2:5], page.kinds[2:5], strict=True):
        assert table[0][1:] == [str(side) for side in RESOLUTIONS]
        assert [row[0] for row in table[1:]] == [str(t) for t in FRAMES]
        best = ""
        for i, j in np.ndindex(len(FRAMES), len(RESOLUTIONS)):
            text, kind = table[1 + i][1 + j], kinds[1 + i][1 + j]
            heads = [
                cell["choose"]
                for cell in given["cells"].values()
                if (cell["frames"], cell["resolution"]) == (FRAMES[i], RESOLUTIONS[j])
                and cell["budget"] == budget
                and cell["method"] != "merge"
            ]
            if FRAMES[i] * (RESOLUTIONS[j] // 14) ** 2 < budget:
                assert (text, kind, heads) == ("", "", [])
                continue
            most = max(own["videos"] for own in heads)
            top1 = max(own["top1"] for own in heads if own["videos"] == most)
            assert text == percent(top1)
            assert kind == "partial" if most < VIDEOS else kind.startswith("known")
            best = text if kind == "known best" else best
        whole = [
            cell["choose"]["top1"]
            for cell in given["cells"].values()
            if cell["budget"] == budget and cell["method"] != "merge"
            if cell["choose"]["videos"] == VIDEOS
        ]
        assert best == percent(max(whole))
    assert [page.text.count(f"{budget:,} token") for budget in BUDGETS] == [2, 2, 2]


def test_a_grid_that_was_not_measured_is_a_dot(tmp_path):
    given = sample()
    for name in [name for name in given["cells"] if "select-1024-12x280" in name]:
        del given["cells"][name]
    table = read(given, tmp_path).tables[4]
    assert table[1 + FRAMES.index(12)][1 + RESOLUTIONS.index(280)] == "\u00b7"


def test_a_report_of_equal_accuracies(tmp_path):
    given = sample()
    for cell in given["cells"].values():
        cell["choose"] = accuracy(0.5, VIDEOS)
    page = read(given, tmp_path)
    kinds = [kind for table in page.kinds[2:5] for row in table for kind in row]
    assert kinds.count("known best") == len(BUDGETS)
    assert "partial" not in kinds
