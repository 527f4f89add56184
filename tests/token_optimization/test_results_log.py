"""What a search has found survives whatever happens to the file, and is summed up rightly."""

import numpy as np
import pytest

from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import Grid
from fluxvit_jax.token_optimization.candidates import Candidate
from fluxvit_jax.token_optimization.results_log import (
    CHOOSE,
    FILE,
    REPORT,
    ResultsLog,
    accuracy,
    best,
    choice,
    difference,
    gain,
)
from tests import tiny

ABOUT = {"weights": "abc", "views": "2x1"}


def filled(folder) -> ResultsLog:
    results = ResultsLog(folder, ABOUT)
    results.add_outcomes(CHOOSE, 0, "a", "15.-")
    results.add_failures(CHOOSE, {3: "no such file"})
    results.add_outcomes(CHOOSE, 4, "a", "11")
    results.add_outcomes(REPORT, 0, "a", "1.")
    results.add_cost("a device", 8, "select-8-2x28", {"milliseconds": 1.5})
    return results


def state(results: ResultsLog) -> tuple:
    return (
        results.outcomes(CHOOSE, "a"),
        results.outcomes(REPORT, "a"),
        results.failures(CHOOSE),
        results.costs("a device", 8),
        results.costs("a device", 4),
        results.costs("another", 8),
        [results.has(CHOOSE, *videos, "a") for videos in ((0, 4), (2, 5), (4, 6), (4, 7), (6, 8))],
    )


EXPECTED = (
    "15.-11",
    "1.",
    {3: "no such file"},
    {"select-8-2x28": {"milliseconds": 1.5}},
    {},
    {},
    [True, True, True, False, False],
)


def test_what_was_added_is_there_again(tmp_path):
    with filled(tmp_path) as results:
        assert state(results) == EXPECTED
        # On disk before the file is closed: a kill loses nothing.
        with ResultsLog(tmp_path, ABOUT) as again:
            assert state(again) == EXPECTED
    with ResultsLog(tmp_path, ABOUT) as again:
        assert state(again) == EXPECTED


def test_a_file_cut_at_any_byte_loses_its_last_line_at_most(tmp_path):
    filled(tmp_path).close()
    path = tmp_path / FILE
    content = path.read_bytes()
    whole_lines = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for end in range(whole_lines[0], len(content)):
        path.write_bytes(content[:end])
        with ResultsLog(tmp_path, ABOUT) as results:
            # What was cut does not spoil what follows.
            results.add_outcomes(CHOOSE, 6, "a", "1")
        lines = tiny.read_lines(path)
        kept = sum(at <= end for at in whole_lines)
        # A line that only lacks its end is whole.
        assert len(lines) - 1 in (kept, kept + 1)
        assert lines[-1]["first"] == 6


def test_a_damaged_line_is_left_out(tmp_path):
    filled(tmp_path).close()
    path = tmp_path / FILE
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:1], "\0\0{]", *lines[2:]]) + "\n")
    with ResultsLog(tmp_path, ABOUT) as results:
        assert results.outcomes(CHOOSE, "a") == ""  # the second chunk stands alone
        assert results.outcomes(REPORT, "a") == "1."


def test_results_of_something_else_are_refused(tmp_path):
    filled(tmp_path).close()
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(UserError, match=r"cells.jsonl: holds results of another weights; remove"):
        ResultsLog(tmp_path, {**ABOUT, "weights": "other"})
    assert (tmp_path / FILE).read_bytes() == before
    (tmp_path / FILE).write_text('{"some": "thing"}\n')
    with pytest.raises(UserError, match="is no file of a search, or damaged; remove it"):
        ResultsLog(tmp_path, ABOUT)


def test_an_empty_file_is_begun_anew(tmp_path):
    (tmp_path / FILE).write_text("")
    filled(tmp_path).close()
    with ResultsLog(tmp_path, ABOUT) as results:
        assert state(results) == EXPECTED


def test_chunks_of_another_size_go_on(tmp_path):
    """Where eval.batch_size changed between two runs."""
    with ResultsLog(tmp_path, ABOUT) as results:
        results.add_outcomes(CHOOSE, 0, "a", "11")
        results.add_outcomes(CHOOSE, 3, "a", "...")
        assert results.outcomes(CHOOSE, "a") == "11"
        ranges = ((0, 2), (0, 3), (2, 3), (3, 6), (4, 6), (4, 7))
        known = [results.has(CHOOSE, *videos, "a") for videos in ranges]
        assert known == [True, False, False, True, True, False]
        results.add_outcomes(CHOOSE, 0, "a", "11.")
        assert results.outcomes(CHOOSE, "a") == "11...."
        assert results.has(CHOOSE, 0, 6, "a")
    # Six videos at once, then the four from the fifth on: no boundary of one is one of the other.
    with ResultsLog(tmp_path, ABOUT) as results:
        results.add_outcomes(CHOOSE, 0, "b", "1" * 6)
        results.add_outcomes(CHOOSE, 4, "b", "15.-")
        assert results.outcomes(CHOOSE, "b") == "111115.-"
    with ResultsLog(tmp_path, ABOUT) as results:
        assert results.outcomes(CHOOSE, "b") == "111115.-"


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        ResultsLog(tmp_path / "file", ABOUT)


def test_accuracy_counts_what_could_not_be_read():
    found = accuracy("11155.-")
    assert found["videos"] == 7
    assert found["top1"] == 3 / 7 and found["top5"] == 5 / 7
    low, high = found["top1_interval"]
    assert low < 3 / 7 < high


def test_differences_are_over_the_same_videos():
    found = difference("11.1", "1...11")
    assert (found["top1"], found["videos"]) == (0.5, 4)
    assert difference("1", "1")["interval"] == (0, 0)


def make_cells() -> list[Candidate]:
    grids = [Grid.square(4, 28), Grid.square(6, 28), Grid.square(8, 42)]
    cells = [Candidate("select", budget, grid, 0) for budget in (16, 12) for grid in grids]
    return [*cells, Candidate("plain", 16, grids[0], 0)]


def test_the_best_is_the_most_accurate_and_then_the_smallest(tmp_path):
    cells = make_cells()
    rng = np.random.default_rng(0)
    for trial in range(50):
        with ResultsLog(tmp_path / str(trial), ABOUT) as results:
            found = {cell: "".join(rng.choice(["1", "."], 3)) for cell in cells}
            for cell, text in found.items():
                results.add_outcomes(CHOOSE, 0, cell.name, text)
            one = best(cells, results, 3)
            most = max(text.count("1") for text in found.values())
            top = [cell for cell in cells if found[cell].count("1") == most]
            assert found[one].count("1") == most
            assert (one.budget, one.grid.tokens) == min((c.budget, c.grid.tokens) for c in top)


def test_only_what_saw_enough_is_chosen(tmp_path):
    cells = make_cells()
    with ResultsLog(tmp_path, ABOUT) as results:
        assert best(cells, results, 0) is None
        for cell in cells:
            results.add_outcomes(CHOOSE, 0, cell.name, "1.")
        early, late = cells[0], cells[1]
        results.add_outcomes(CHOOSE, 2, late.name, "..")
        assert best([early, late], results, 2) == early  # as good, and smaller
        assert best([early, late], results, 4) == late  # the other was stopped
        chosen = choice(cells, 16, results, 2)
        assert chosen == {"select": cells[0], "plain": cells[-1], "merge": None}
        assert gain(chosen["select"], chosen["plain"], results) is None  # not reported yet
        results.add_outcomes(REPORT, 0, chosen["select"].name, "111")
        results.add_outcomes(REPORT, 0, chosen["plain"].name, "1.1")
        found = gain(chosen["select"], chosen["plain"], results)
        assert found["top1"] == pytest.approx(1 / 3) and found["videos"] == 3
        assert gain(chosen["select"], None, results) is None
