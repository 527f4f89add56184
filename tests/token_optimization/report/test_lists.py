"""The lists of all cells and of those that were stopped."""

from tests.token_optimization.report.sample import DEVICES, percent, words


def test_lists_have_every_cell_and_every_one_that_was_stopped(given, page):
    stopped, everything = page.tables[-2:]
    assert len(stopped) == 1 + len(given["skipped"])
    for row, one in zip(stopped[1:], given["skipped"], strict=True):
        top1 = given["cells"][one["cell"]]["choose"]["top1"]
        assert row[:2] == [one["cell"], str(one["videos"])]
        assert row[2].startswith(f"{percent(top1)} % (")
    assert {row[0] for row in everything[2:]} == given["cells"].keys()
    by_name = {row[0]: row for row in everything[2:]}
    name = given["chosen"]["1024"]["select"]
    cell, row = given["cells"][name], [words(text) for text in by_name[name]]
    assert row[1:3] == ["1,024", "2,000"]
    assert row[6] == "20,000"
    assert row[7].startswith(f"{percent(cell['report']['top1'])} % (")
    batch = given["devices"][DEVICES[1]]["cells"][name]["batch_milliseconds"]
    assert f"{batch:.2f}" in row
