"""The page of an evaluation and its tables: their numbers, by hand, from the predictions alone."""

import csv
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import calibration, report, results
from fluxvit_jax.reports.confidence_intervals import share_interval
from tests.token_optimization.report.sample import Page, words

NASTY = "<script>alert(1)</script> & $x$"
NONE = "\N{EN DASH}"  # of an empty cell
NAMES = ["run", NASTY, "=HYPERLINK(1)"]
# label, then class and probability at 24 tokens, then the class at 12.
VIDEOS = [(0, 0, 0.9, 0), (0, 1, 0.6, 0), (0, 1, 0.8, 1), (1, 1, 0.7, 2), (1, 2, 0.95, 2)]


def write(folder: Path, names=NAMES, about: bool = True) -> Path:
    """The files of an evaluation of `VIDEOS` and of one that could not be read."""
    lines = []
    for number, (label, first, probability, other) in enumerate(VIDEOS):
        rest = [[c, (1 - probability) / 2] for c in range(3) if c != first]
        tops = {"24": [[first, probability], *rest], "12": [[other, 1.0]]}
        lines.append({"id": f"{number}.mp4", "label": label, "predictions": tops})
    lines.append({"id": "=bad.mp4", "label": 1, "failure": "truncated"})
    path = folder / "val-0a.predictions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if about:
        content = {"checkpoint": "checkpoints/20", "class_names": names, "views": "4x3"}
        content |= {"failures": [{"id": "=bad.mp4", "reason": "truncated"}], "warning": NASTY}
        content |= {"budgets": {b: {"frames": 6, "resolution": 42} for b in ("24", "12")}}
        (folder / "val-0a.json").write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    assert report.write(write(folder)) == folder / "val-0a.html"
    return folder


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_the_matrix_counts_videos_and_those_that_were_not_read(folder):
    rows = read_csv(folder / "val-0a.confusion.csv")
    assert rows[0] == ["true class", "run", NASTY, "'=HYPERLINK(1)", "could not be read"]
    assert rows[1:] == [
        ["run", "1", "2", "0", "0"],
        [NASTY, "0", "1", "1", "1"],
        ["'=HYPERLINK(1)", "0", "0", "0", "0"],
    ]


def test_accuracy_by_class_and_budget(folder):
    header, *rows = read_csv(folder / "val-0a.classes.csv")
    assert header[:3] == ["class", "name", "videos"] and header[6] == "top1_12"
    first = dict(zip(header, rows[0], strict=True))
    assert [first["videos"], first["top1_24"], first["top1_12"]] == ["3", "0.333333", "0.666667"]
    ends = [float(first[f"top1_{end}_24"]) for end in ("low", "high")]
    assert ends == pytest.approx(share_interval(1, 3), abs=1e-6)
    assert rows[1][3] == "0.333333"  # of three, although one could not be read
    assert rows[2] == ["2", "'=HYPERLINK(1)", "0", *[""] * 6]


def test_the_page_says_it(folder):
    page = Page(folder / "val-0a.html")
    text = words(page.text)
    budgets, pairs, classes, everything, mistakes, failures = page.tables
    low, high = share_interval(2, 6)
    assert budgets[1][0].startswith("24 tokens") and "6 frames of 42 px" in budgets[1][0]
    assert " ".join(budgets[1][1].split()) == f"33.3 % {100 * low:.1f} to {100 * high:.1f} %"
    assert "Top-5" not in text  # of three classes
    assert [row[2] for row in pairs[1:]] == ["2 of 3", "1 of 3"]
    assert [row[0] for row in pairs[1:]] == ["run", NASTY]
    assert [row[1] for row in classes[1:]] == ["3", "3"]
    assert everything[1] == ["run", "3", "33.3 %", "66.7 %"]
    assert [row[0] for row in mistakes[1:]] == ["4.mp4", "2.mp4", "1.mp4"]
    assert mistakes[1][2].startswith("=HYPERLINK(1)") and "95.0 %" in mistakes[1][2]
    assert failures[1] == ["=bad.mp4", "truncated"]


def test_the_page_is_whole_and_holds_names_as_text(folder):
    page, text = Page(folder / "val-0a.html"), (folder / "val-0a.html").read_text()
    assert page.elements.keys().isdisjoint({"link", "script", "iframe", "base"})
    assert not re.search(r"url\(|@import|https?:", text)
    addresses = [own["src"] for own in page.elements["img"]]
    addresses += [own["srcset"] for own in page.elements["source"]]
    assert len(addresses) == 8 and all(own.startswith("data:image/svg+xml") for own in addresses)
    assert page.text.count(NASTY) >= 4 and "prefers-color-scheme: dark" in text


def test_the_same_predictions_make_the_same_files(folder, tmp_path):
    report.write(write(tmp_path))
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def test_hundreds_of_classes_stay_visible(tmp_path):
    """A single confusion among 700 classes is seen in the picture file."""
    confusion = np.zeros((700, 701), np.int64)
    confusion[np.arange(700), np.arange(700)] = 10
    plain = report.confusion_chart.png(confusion, [f"class {i}" for i in range(700)])
    confusion[600, 100] = 1
    seen = report.confusion_chart.png(confusion, [f"class {i}" for i in range(700)])
    images = [cv2.imdecode(np.frombuffer(own, np.uint8), 1).astype(int) for own in (plain, seen)]
    changed = np.argwhere(np.abs(images[0] - images[1]).sum(-1) > 30)
    assert len(changed) >= 4 and min(images[0].shape[:2]) >= 1400


def test_predictions_alone_and_what_is_none(tmp_path, capsys):
    path = write(tmp_path, about=False)
    assert report.main([str(path)]) == 0
    assert "class 2" in (tmp_path / "val-0a.html").read_text()
    (tmp_path / "a.predictions.jsonl").write_text('{"id": "a", "label"\n')
    (tmp_path / "b.predictions.jsonl").write_text('{"id": "a", "label": 0, "failure": "gone"}\n')
    for name, message in (
        ("val.json", "is no file of predictions"),
        ("none.predictions.jsonl", "cannot be read"),
        ("a.predictions.jsonl", "line 1: no JSON"),
        ("b.predictions.jsonl", "has no prediction"),
    ):
        capsys.readouterr()
        assert report.main([str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        with pytest.raises(UserError, match=message):
            results.read(tmp_path / name)


def test_help_and_a_wrong_command_line(capsys):
    with pytest.raises(SystemExit) as end:
        report.main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr()
    assert "NAME.predictions.jsonl" in said.out and not said.err
    for wrong in ([], ["a", "b"]):
        assert report.main(wrong) == 2
        error = capsys.readouterr().err
        assert "see --help" in error and error.count("\n") == 1


def test_the_page_shows_calibration(tmp_path):
    path = write(tmp_path)
    about = tmp_path / "val-0a.json"
    content = json.loads(about.read_text())
    sure = np.array([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.3, 0.7, 0], [0.02, 0.02, 0.96]])
    for budget, probabilities in (("24", sure), ("12", np.full((4, 3), 1 / 3))):
        measured = calibration.measure(probabilities, np.array([0, 1, 0, 1]))
        content["budgets"][budget]["calibration"] = measured
    about.write_text(json.dumps(content))
    page = Page(report.write(path))
    tables = [[[cell.strip() for cell in row] for row in one] for one in page.tables]
    numbers, bins = tables[-3:-1]
    assert numbers[1][:2] == ["24 tokens", "49.0 %"]  # (0.1 + 0.2 + 0.7 + 0.96) / 4
    assert numbers[2][:3] == ["12 tokens", "16.7 %", "1.00"]  # the first class is right for half
    assert len(bins) == 2 + calibration.BINS
    assert bins[-1] == ["to 100.0 %", "1", "96.0 %", "0.0 %", "0", NONE, NONE]
    assert bins[6] == ["to 33.3 %", "0", NONE, NONE, "4", "33.3 %", "50.0 %"]
    alts = [own["alt"] for own in page.elements["img"]]
    assert "24 tokens: 0 % right at 70 %; 100 % right at 80 %; 100 % right at 90 %" in " ".join(
        alts
    )
    assert "24 tokens: ECE 49.0 %" in words(page.text)
