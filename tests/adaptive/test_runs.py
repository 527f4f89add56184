"""A cascade answers alike in evaluation, Python, --mode=predict and an exported folder."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from etils import epath

import fluxvit_jax
from fluxvit_jax.adaptive import evaluate_adaptive, fitting
from fluxvit_jax.adaptive.cascade import Cascade, Step, confidence, write
from fluxvit_jax.adaptive.motion import MotionRule
from fluxvit_jax.checkpoints.checkpointer import restore_params
from fluxvit_jax.data.annotations import open_source
from fluxvit_jax.deploy import export, predict
from fluxvit_jax.distributed.mesh import make_mesh
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import evaluate, tasks
from fluxvit_jax.evaluation.settings import Setting
from fluxvit_jax.grids import Grid
from fluxvit_jax.token_optimization import latency, search
from fluxvit_jax.token_optimization.planner import read_report
from fluxvit_jax.token_optimization.probability_store import ProbabilityStore
from tests import tiny

# The last two look at one grid, whose patches are ranked once for both.
CELLS = ((12, 4, 28, 1), (12, 6, 42, 1), (24, 6, 42, 0))
NAMES = [f"select-{budget}-{T}x{size}-h{head}" for budget, T, size, head in CELLS]
VIDEOS = 12  # of the validation list that can be read


class Searched(NamedTuple):
    """A finished run with a search, whose report also has `CASCADE`."""

    workdir: Path
    cascade: Cascade
    tables: list[np.ndarray]  # what each cell says of the videos of the validation list
    labels: np.ndarray


def make_config(folder: Path, **changes):
    choose = {"search__split": str(folder / "train.csv"), "data__train": "", "eval__clips": 1}
    return tiny.make_config(folder, **(choose | changes))


@pytest.fixture(scope="module")
def searched(finished, tiny_data, compiled, tmp_path_factory) -> Searched:
    workdir = tmp_path_factory.mktemp("adaptive") / "run"
    shutil.copytree(finished.workdir, workdir)
    config = make_config(tiny_data)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("WARM_UP_SECONDS", 0), ("FEWEST_CALLS", 2), ("SECONDS", 0)):
            patch.setattr(latency, name, value)
        assert search.run(config, str(workdir)) == 0
    params, source = restore_params(workdir), open_source(config.data.validation, "")
    tables, labels = [], np.array([])
    for budget, frames, size, head in CELLS:
        setting = Setting(budget, Grid.square(frames, size), head)
        found = evaluate.evaluate(params, config, source, settings=[setting])
        read = [one for one in found.predictions if "predictions" in one]
        labels = np.array([one["label"] for one in read])
        table = np.zeros((VIDEOS, tiny.CLASSES), np.float32)
        for row, one in zip(table, read, strict=True):
            for label, probability in one["predictions"][str(budget)]:
                row[label] = probability
        tables.append(table)
    cascade = make_cascade(tables)
    add_to_report(workdir, cascade)
    return Searched(workdir, cascade, tables, labels)


def make_cascade(tables: list[np.ndarray]) -> Cascade:
    """A third of the videos stops at each step, none of them close to a threshold."""
    steps, average, left = [], None, np.arange(VIDEOS)
    for number, (table, name) in enumerate(zip(tables, NAMES, strict=True), 1):
        size = dict(zip(("budget", "frames", "resolution", "head"), CELLS[number - 1], strict=True))
        step = Step(**size, temperature=1.2, weight=1 / number, threshold=2.0, cell=name)
        before = average
        average, _ = Cascade((step, step), "margin").join(0, table, None)
        if before is not None:
            average = before + step.weight * (average - before)
        sure = np.sort(confidence("margin", average[left], average[left], before))
        cut = len(sure) - VIDEOS // 3
        threshold = float(sure[cut - 1 : cut + 1].mean()) if number < len(tables) else None
        steps.append(dataclasses.replace(step, threshold=threshold))
        if threshold is not None:
            left = left[confidence("margin", average[left], average[left], None) < threshold]
    return Cascade(tuple(steps), "margin")


def add_to_report(workdir: Path, cascade: Cascade) -> None:
    """As the most accurate of all, so that every plan with room for it takes it."""
    path = workdir / "search" / "report.json"
    report = json.loads(path.read_text())
    best = {"videos": 16, "top1": 1.5, "top1_interval": [0.0, 1.0]}
    best |= {"average_gflops": 0.001, "reached": [1.0, 0.6, 0.3], "credited": 1.5}
    own = {"gflops": [0.001, 0.002, 0.003], "choose": best, "report": best, "over": None}
    report["cascades"]["by-hand"] = cascade.to_json() | own | {"stopped_by_class": {"0": [3, 2, 1]}}
    path.write_text(json.dumps(report))


def expected(searched: Searched):
    return searched.cascade.run(VIDEOS, lambda number, videos: searched.tables[number][videos])


def paths(tiny_data: Path) -> list[str]:
    """The readable videos of the validation list."""
    lines = (tiny_data / "validation.csv").read_text().splitlines()[1:]
    names = [line.split(",")[0] for line in lines]
    return [str(tiny_data / name) for name in names if name != tiny.BAD]


def test_evaluation_in_full_batches_is_that_of_every_video_alone(
    searched, tiny_data, tmp_path, capsys
):
    config = make_config(tiny_data, eval__cascade="by-hand")
    assert tasks.run(config, str(searched.workdir)) == 0
    report, lines = tiny.read_evaluation(searched.workdir)
    answers = expected(searched)
    assert set(answers.step) == {0, 1, 2}
    read = [line for line in lines if "failure" not in line]
    assert [line["step"] - 1 for line in read] == answers.step.tolist()
    for line, row in zip(read, answers.probabilities, strict=True):
        for label, probability in line["predictions"]["cascade"]:
            assert probability == pytest.approx(row[label], abs=3e-6)
    saved = tmp_path / "saved"
    fluxvit_jax.from_pretrained(searched.workdir).save_pretrained(saved)
    again = fluxvit_jax.from_pretrained(saved)
    assert all("cascade" not in one["budgets"] for one in again.evaluations)
    assert "cascade" not in map(str, again.temperatures)
    own = report["budgets"]["cascade"]
    right = (answers.probabilities.argmax(axis=1) == searched.labels).sum()
    assert own["top1"] == right / (VIDEOS + 1) and own["failed"] == 1
    assert own["answered"] == [(answers.step == n).mean() for n in range(3)]
    assert 0 < own["average_tokens"] < 12 + 12 + 24
    assert own["calibration"]["ece"] >= 0 and report["task"] == "cascade"
    printed = capsys.readouterr().out
    assert "videos a second" in printed and f"top-1 {own['top1']:.2%}" in printed
    (page,) = (searched.workdir / "evaluation").glob("*-cascade-*.html")
    assert "cascade" in page.read_text()


def test_a_cascade_of_one_step_is_that_cell_bit_for_bit(searched, tiny_data):
    config, source = make_config(tiny_data), open_source(str(tiny_data / "validation.csv"), "")
    params, (budget, frames, size, head) = restore_params(searched.workdir), CELLS[2]
    one = Step(budget=budget, frames=frames, resolution=size, head=head)
    found = evaluate_adaptive.evaluate_adaptive(
        Cascade((one,)), params, config, source, make_mesh(config)
    )
    setting = Setting(budget, Grid.square(frames, size), head)
    cell = evaluate.evaluate(params, config, source, settings=[setting])
    for ours, theirs in zip(found.predictions, cell.predictions, strict=True):
        if "failure" not in theirs:
            assert ours["predictions"]["cascade"] == theirs["predictions"][str(budget)]
    own = found.report["budgets"]["cascade"]
    assert {"top1": own["top1"], "loss": own["loss"]} == {
        key: cell.report["budgets"][str(budget)][key] for key in ("top1", "loss")
    }


def test_views_are_looked_at_one_by_one(searched, tiny_data):
    """The first of two views of each video, and the second only in doubt: the mean of both."""
    config = make_config(tiny_data, eval__clips=2)
    source = open_source(config.data.validation, "")
    params, (budget, frames, size, head) = restore_params(searched.workdir), CELLS[0]
    setting = Setting(budget, Grid.square(frames, size), head)
    both = evaluate.evaluate(params, config, source, settings=[setting]).predictions
    step = Step(budget=budget, frames=frames, resolution=size, head=head, views=1, threshold=0.0)
    more = dataclasses.replace(step, views=0, threshold=None)
    mesh = make_mesh(config)

    def top(threshold: float) -> list:
        early = dataclasses.replace(step, threshold=threshold)
        cascade = Cascade((early, more))
        return evaluate_adaptive.evaluate_adaptive(
            cascade, params, config, source, mesh
        ).predictions

    read = [number for number, one in enumerate(both) if "failure" not in one]
    first, second = top(0.0), top(2.0)
    assert {first[n]["step"] for n in read} == {1} and {second[n]["step"] for n in read} == {2}
    sure = sorted(first[n]["predictions"]["cascade"][0][1] for n in read)
    mixed = top((sure[5] + sure[6]) / 2)
    assert [mixed[n]["step"] for n in read].count(1) == 6
    for n in read:
        assert second[n]["predictions"]["cascade"] == both[n]["predictions"][str(budget)]
        assert (
            mixed[n]["predictions"]
            == (first if mixed[n]["step"] == 1 else second)[n]["predictions"]
        )


@pytest.mark.slow
def test_python_prediction_and_export_give_the_same_answers(searched, tiny_data, tmp_path):
    answers, videos = expected(searched), paths(tiny_data)
    model = fluxvit_jax.from_pretrained(searched.workdir)
    best = fluxvit_jax.plan(searched.workdir, average_gflops=0.5)
    assert best.cascade == searched.cascade and best.name == "by-hand"
    found = model.run_cascade(videos, best.cascade)
    np.testing.assert_allclose(found.probabilities, answers.probabilities, atol=1e-5)
    assert found.step.tolist() == answers.step.tolist()

    options = predict.Options(
        weights=str(searched.workdir),
        out=str(tmp_path / "predicted"),
        tokens=(),
        network="",
        dtype=None,
        video=str(tiny_data),
        average_gflops=0.5,
    )
    assert predict.run(options) == 0
    rows = list(csv.DictReader((tmp_path / "predicted" / predict.CSV).open()))
    by_name = {row["video"]: row for row in rows}
    for video, step, row in zip(videos, answers.step, answers.probabilities, strict=True):
        own = by_name[Path(video).name]
        assert int(own["tokens"]) == CELLS[step][0] and int(own["frames"]) == CELLS[step][1]
        assert own["class1"] == f"class {row.argmax()}"
        assert float(own["probability1"]) == pytest.approx(row.max(), abs=1e-5)

    assert export.run(str(searched.workdir), str(tmp_path / "exported")) == 0
    server = fluxvit_jax.load_exported(tmp_path / "exported")
    assert server.cascade_within(average_gflops=0.5).cascade == searched.cascade
    frames = np.concatenate(
        [fluxvit_jax.read_video(path, 12)[None, :, :40, :40] for path in videos]
    )
    theirs, ours = server(frames, average_gflops=0.5), model.run_cascade(frames, best.cascade)
    np.testing.assert_allclose(theirs.probabilities, ours.probabilities, atol=1e-5)
    assert theirs.step.tolist() == ours.step.tolist()
    with pytest.raises(ValueError, match=r"no cascade is within 1e-09 GFLOPs on average"):
        server(frames, average_gflops=1e-9)
    timed = server.cascade_within(average_milliseconds=1e6, milliseconds=1e6)
    assert timed.average_milliseconds > 0
    with pytest.raises(ValueError, match="give one"):
        server(frames, tokens=24, average_gflops=0.5)


def test_plans_keep_within_both_limits(searched):
    """The cascade by hand is the best, costs 0.001 GFLOPs on average and 0.006 at worst."""
    plan = fluxvit_jax.plan
    within = plan(searched.workdir, average_gflops=0.5, gflops=0.0061)
    assert within.name == "by-hand" and within.cost("gflops") == pytest.approx(0.006)
    assert plan(searched.workdir, average_gflops=0.5, gflops=0.0059).name != "by-hand"
    said = str(within)
    assert "On average 0.001 GFLOPs, at worst 0.006 GFLOPs" in said
    assert "60%, 30% of the videos go on" in said
    for limits, message in (
        ({"average_gflops": 1, "average_milliseconds": 1}, "of milliseconds or of gflops"),
        ({"average_gflops": 1, "tokens": 3}, "of milliseconds or of gflops"),
        ({"average_gflops": 0}, "a limit is a number above 0"),
        ({"average_gflops": 1, "gflops": 1e-9}, "and 1e-09 GFLOPs at worst; the cheapest"),
    ):
        with pytest.raises(UserError, match=message):
            plan(searched.workdir, **limits)


def test_one_video_says_after_which_step_it_is_sure(searched, tiny_data, tmp_path, capsys):
    answers = expected(searched)
    number = int(np.flatnonzero(answers.step == 1)[0])
    options = predict.Options(
        weights=str(searched.workdir),
        out=str(tmp_path),
        tokens=(),
        network="",
        dtype=None,
        video=paths(tiny_data)[number],
        average_milliseconds=1e6,
    )
    assert predict.run(options) == 0
    printed = capsys.readouterr().out
    assert "sure after 2 of 3 steps" in printed and printed.count("12 of ") == 2
    for changes, message in (
        ({"tokens": (12,)}, "both choose a budget"),
        ({"window": "1s"}, "--window: is for one budget"),
        ({"features": "pooled"}, "--features: is for one budget"),
        ({"average_milliseconds": 1e-9}, "no cascade is within 1e-09 ms on average"),
    ):
        with pytest.raises(UserError, match=message):
            predict.run(options._replace(**changes))


def test_a_search_finds_cascades_and_says_how_they_do(searched):
    report = read_report(searched.workdir)
    cascades = {name: own for name, own in report["cascades"].items() if name != "by-hand"}
    assert cascades and list(cascades) == sorted(cascades)
    costs = [own["choose"]["average_gflops"] for own in cascades.values()]
    assert costs == sorted(costs)
    for own in cascades.values():
        for split, videos in (("choose", 16), ("report", 13)):
            assert own[split]["videos"] == videos
            assert 0 <= own[split]["top1_interval"][0] <= own[split]["top1"]
            assert own[split]["reached"][0] == 1
        assert {step["cell"] for step in own["steps"]} <= set(report["cells"])
        stopped = np.sum(list(own["stopped_by_class"].values()), axis=0)
        assert stopped.sum() == VIDEOS
        assert own["report"]["reached"][-1] == stopped[-1] / VIDEOS
        if len(own["steps"]) == 1:
            cell = report["cells"][own["steps"][0]["cell"]]
            assert own["choose"]["top1"] == cell["choose"]["top1"] == own["choose"]["credited"]
            assert own["report"]["top1"] == cell["report"]["top1"]
            assert own["choose"]["average_gflops"] == pytest.approx(cell["gflops"])
            assert own["over"]["top1"] == 0
    page = (searched.workdir / "search" / "report.html").read_text()
    assert 'class="line cascades"' in page


def test_probabilities_are_evaluated_again_where_they_are_missing(searched, tiny_data, tmp_path):
    """As of a search that was made before there were cascades."""
    workdir = tmp_path / "older"
    shutil.copytree(searched.workdir, workdir)
    before = json.loads((workdir / "search" / "report.json").read_text())
    del before["cascades"]
    (workdir / "search" / "report.json").write_text(json.dumps(before))
    with pytest.raises(UserError, match=r"the report has no cascades: .* run --mode=search again"):
        fluxvit_jax.plan(workdir, average_gflops=1)
    folder = workdir / "search" / "probabilities"
    files = sorted(folder.rglob("*.npz"))
    kept = {file: file.read_bytes() for file in files}
    shutil.rmtree(files[0].parent)
    with files[-1].open("r+b") as damaged:
        damaged.seek(100)
        damaged.write(b"\xff\xff")
    config = make_config(tiny_data)
    with pytest.raises(UserError, match=r"is missing or damaged; remove .*probabilities and run"):
        search.run(config, str(workdir))
    files[-1].unlink()
    assert search.run(config, str(workdir)) == 0
    assert {file: file.read_bytes() for file in folder.rglob("*.npz")} == kept
    again, first = read_report(workdir), read_report(searched.workdir)
    first["cascades"].pop("by-hand")
    assert json.dumps(again["cascades"]) == json.dumps(first["cascades"])


def test_a_rule_of_motion_asks_each_video_at_its_cell(searched, tiny_data, tmp_path, capsys):
    report = read_report(searched.workdir)
    store = ProbabilityStore(epath.Path(searched.workdir) / "search")
    scores = store.read("report", search.MOTION, VIDEOS + 1)[:, 0, 0]
    source = open_source(str(tiny_data / "validation.csv"), "")
    scores = scores[[n for n in range(len(source)) if source[n].id != tiny.BAD]]
    middle = float(np.sort(scores)[5:7].mean())
    rule = MotionRule(
        tuple(
            Step(budget=budget, frames=frames, resolution=size, head=head, cell=name)
            for (budget, frames, size, head), name in zip(CELLS[::2], NAMES[::2], strict=True)
        ),
        (middle,),
        True,
        (4, 28),  # the grid of the fewest tokens
    )
    described = {"videos": 16, "top1": 1.0, "top1_interval": [0, 1], "average_gflops": 0.001}
    workdir = tmp_path / "run"
    shutil.copytree(searched.workdir, workdir)
    path = workdir / "search" / "report.json"
    shares = {"choose": described | {"shares": [0.5, 0.5], "credited": 1.0}, "report": described}
    report["motion"]["by-hand"] = rule.to_json() | shares
    path.write_text(json.dumps(report))
    config = make_config(tiny_data, eval__adaptive="motion", eval__cascade="by-hand")
    assert tasks.run(config, str(workdir)) == 0
    found, lines = tiny.read_evaluation(workdir)
    cells = rule.route(scores)
    assert sorted(set(cells)) == [0, 1]
    answered = [line for line in lines if "failure" not in line]
    assert [line["step"] - 1 for line in answered] == cells.tolist()
    for number, (line, cell) in enumerate(zip(answered, cells, strict=True)):
        expected = searched.tables[(0, 2)[cell]][number]
        for label, probability in line["predictions"]["motion"]:
            assert probability == pytest.approx(expected[label], abs=3e-6)
    assert found["budgets"]["motion"]["answered"] == [(cells == n).mean() for n in (0, 1)]
    assert "answer here" in capsys.readouterr().out
    for text, message in (
        ("average_gflops=1e-9", r"no rule of motion is within average_gflops=1e-9; the cheapest"),
        ("motion-99", "has no rule of motion 'motion-99'"),
    ):
        config = make_config(tiny_data, eval__adaptive="motion", eval__cascade=text)
        with pytest.raises(UserError, match=message):
            tasks.run(config, str(workdir))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cascade-99", "has no cascade 'cascade-99'; there are cascade-01"),
        ("average_gflops=much", "'much' is no number"),
        ("average_gflops=nan", "a limit is a number above 0"),
        ("gflops=3", "needs one of average_milliseconds and average_gflops"),
        ("average_tokens=3", "'average_tokens' is none of"),
        ("average_gflops=-1", "a limit is a number above 0"),
        ("average_gflops=1,average_gflops=2", "average_gflops is there twice"),
        ("none.json", r"none\.json: cannot be read as a cascade"),
    ],
)
def test_what_eval_cascade_cannot_be(searched, tiny_data, text, message):
    with pytest.raises(UserError, match=message):
        tasks.run(make_config(tiny_data, eval__cascade=text), str(searched.workdir))


def test_cascades_by_hand(searched, tiny_data, tmp_path):
    """A file needs no search, but heads and views that are there."""
    path = tmp_path / "mine.json"
    steps = searched.cascade.steps
    for changes, message in (
        ({"head": 5}, "the network has no head 5"),
        ({"views": 3}, "looks at 3 views, and eval.clips x eval.crops has 1"),
    ):
        last = dataclasses.replace(steps[-1], **changes)
        write(Cascade((*steps[:-1], last), "margin"), path)
        with pytest.raises(UserError, match=message):
            tasks.run(make_config(tiny_data, eval__cascade=str(path)), str(searched.workdir))
    with pytest.raises(UserError, match=r"eval.cascade: classifies videos, and eval.task is retr"):
        config = make_config(tiny_data, eval__cascade=str(path), eval__task="retrieval")
        tasks.run(config, str(searched.workdir))


def test_shared_rankings_are_counted_once():
    steps = [
        Step(budget=budget, frames=frames, resolution=size, head=head, threshold=0.5)
        for budget, frames, size, head in CELLS
    ]
    passes = Cascade(tuple(steps)).passes(1, shares_ranking=True)
    assert [one.ranked_budget for one in passes] == [0, 24, 0]
    assert [one.takes_ranking for one in passes] == [False, False, True]
    assert [len(one.later_grids) for one in passes] == [1, 1, 0]
    none = np.zeros((0, 2), np.float32)
    entries = [fitting.Entry(step=step, probabilities=none, cost=5.0, shared=1.5) for step in steps]
    assert fitting.costs_of(entries) == [5, 5, 3.5]
