"""A search of real videos: its numbers, what it decodes, and that nothing stops it for good."""

import contextlib
import json
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from fluxvit_jax.data.annotations import open_source
from fluxvit_jax.data.decoding import Video
from fluxvit_jax.distributed.watchdog import STATUS, Watchdog
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import evaluate, tasks
from fluxvit_jax.evaluation.trained_weights import Weights, load_weights
from fluxvit_jax.grids import Grid
from fluxvit_jax.token_optimization import candidate_evaluator, frame_reader, latency, search
from fluxvit_jax.token_optimization.frame_reader import FrameReader
from fluxvit_jax.token_optimization.planner import read_report
from fluxvit_jax.token_optimization.probability_store import ProbabilityStore
from fluxvit_jax.token_optimization.results_log import FILE
from fluxvit_jax.training import train
from tests import limited, tiny
from tests.data.bad_readers import REASONS, open_fatal
from tests.evaluation.test_evaluate import random_params
from tests.test_main import outcome_here

VIDEOS = {"choose": 16, "report": 13}
# All cells of the tiny recipe: 24 of (4 x 42, 6 x 28, 6 x 42), 12 of all four grids; one of the
# grids holds 24 tokens as it is.
CELLS = 3 + 4 + 1


@pytest.fixture(autouse=True, scope="module")
def quick_timing():
    """What is timed is tested in test_latency; here it only has to be done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "WARM_UP_SECONDS", 0)
        patch.setattr(latency, "FEWEST_CALLS", 2)
        patch.setattr(latency, "SECONDS", 0)
        yield


def make_config(folder: Path, **changes):
    choose = {"search__split": str(folder / "train.csv"), "data__train": ""}
    return tiny.make_config(folder, **(choose | changes))


def weights_of(config) -> Weights:
    return Weights(random_params(config), "random", None)


def run(folder: Path, out: Path, weights=None, **changes) -> dict:
    """The report of a search with a network that tells its classes apart."""
    config = make_config(folder, **changes)
    weights = weights or weights_of(config)
    splits, notes = search.splits_of(config, weights)
    with search.Search(config, weights, splits, notes, out, Watchdog(0, out)) as one:
        one.choose()
        one.report()
        one.measure_costs()
        one.find_cascades()
        one.write()
    return read_report(out)


@contextlib.contextmanager
def noting_openings() -> Iterator[list[str]]:
    """The names of the files that are opened meanwhile."""
    opened, real = [], Video.__init__

    def count(self, path, *rest):
        opened.append(Path(path).name)
        real(self, path, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Video, "__init__", count)
        yield opened


@pytest.fixture(scope="module")
def found(tiny_data, compiled, tmp_path_factory) -> tuple[dict, list[str]]:
    """The report of a whole search, and the names of the files it opened."""
    with noting_openings() as opened:
        return run(tiny_data, tmp_path_factory.mktemp("search")), opened


def without_times(report: dict) -> str:
    return json.dumps({name: own for name, own in report.items() if name != "devices"})


def test_a_report_has_all_cells_and_all_that_is_known_of_them(found):
    report, _ = found
    assert len(report["cells"]) == CELLS
    (table,) = report["devices"].values()
    assert table["batch"] == 2 and set(table["cells"]) == set(report["cells"])
    (note,) = report["notes"]
    said = "Reporting split: 1 of 13 videos could not be read and count as wrong; bad.mp4: "
    assert note.startswith(said) and "; that is more than data.max_bad_fraction=0.05; " in note
    assert report["skipped"] == []
    for name, cell in report["cells"].items():
        assert name == (
            f"{cell['method']}-{cell['budget']}-{cell['frames']}x{cell['resolution']}"
            f"-h{cell['head']}"
        )
        assert cell["tokens"] == cell["budget"]
        assert cell["choose"]["videos"] == VIDEOS["choose"]
    chosen = [report["chosen"][budget] for budget in ("24", "12")]
    assert all(own["select"] and own["merge"] is None for own in chosen)
    assert [own["plain"] for own in chosen] == ["plain-24-6x28-h0", None]
    reported = {own[method] for own in chosen for method in ("select", "plain")} - {None}
    reported |= {s["cell"] for own in report["cascades"].values() for s in own["steps"]}
    assert {n for n, cell in report["cells"].items() if "report" in cell} >= reported
    assert {cell["report"]["videos"] for n, cell in report["cells"].items() if n in reported} == {
        VIDEOS["report"]
    }


def test_a_grid_of_just_the_budget_costs_the_same_selected_or_not(found):
    (table,) = found[0]["devices"].values()
    assert table["cells"]["select-24-6x28-h0"] == table["cells"]["plain-24-6x28-h0"]


def test_the_chosen_cell_is_the_most_accurate_on_the_choosing_split(found):
    report, _ = found
    for budget, own in report["chosen"].items():
        rivals = {
            name: cell["choose"]["top1"]
            for name, cell in report["cells"].items()
            if (cell["method"], cell["budget"]) == ("select", int(budget))
        }
        assert rivals[own["select"]] == max(rivals.values())


def test_each_video_is_decoded_once_for_all_cells(found):
    _, opened = found
    assert len(opened) == len(set(opened)) == sum(VIDEOS.values())


def test_numbers_are_those_of_separate_evaluations(found, tiny_data):
    """Of every third cell on the choosing list, and of the chosen ones on both lists."""
    report, _ = found
    cells = [cell for cell in report["cells"].values() if "report" in cell]
    cells += [cell for cell in report["cells"].values() if "report" not in cell][::3]
    lists = {"choose": "train.csv", "report": "validation.csv"}
    params = random_params(make_config(tiny_data))
    for cell in cells:
        setting = (cell["budget"], cell["frames"], cell["resolution"])
        for split in {"choose", "report"} & set(cell):
            config = make_config(
                tiny_data,
                eval__settings=(setting,),
                data__validation=str(tiny_data / lists[split]),
            )
            source = open_source(config.data.validation, config.data.root, config.model.classes)
            alone = evaluate.evaluate(params, config, source)
            (own,) = alone.report["budgets"].values()
            assert own["head"] == cell["head"] and own["tokens"] == cell["tokens"]
            for share in ("top1", "top5"):
                assert cell[split][share] == own[share], (setting, split)


def test_a_video_that_cannot_be_read_counts_as_wrong(found, tiny_data):
    report, _ = found
    assert report["choose"]["failed"] == 0 and report["report"]["failed"] == 1
    reported = [cell["report"] for cell in report["cells"].values() if "report" in cell]
    assert {cell["top5"] for cell in reported} == {12 / 13}  # of four classes


@pytest.mark.slow
def test_large_videos_are_decoded_again_for_the_same_numbers(
    tiny_data, compiled, tmp_path, monkeypatch
):
    few = {"search__budgets": (12,), "search__frames": "4"}
    once = run(tiny_data, tmp_path / "once", **few)
    monkeypatch.setattr(frame_reader, "MAX_DECODED_BYTES", 0)
    assert without_times(run(tiny_data, tmp_path / "again", **few)) == without_times(once)


@pytest.mark.slow
def test_more_cells_later_keep_what_is_known(tiny_data, compiled, tmp_path, monkeypatch):
    less = run(tiny_data, tmp_path, search__budgets=(12,), search__frames="4")
    seen = []
    evaluate_chunk = candidate_evaluator.CandidateEvaluator.evaluate

    def note(self, videos, cells, reader):
        seen.extend(cell.name for cell in cells)
        return evaluate_chunk(self, videos, cells, reader)

    monkeypatch.setattr(candidate_evaluator.CandidateEvaluator, "evaluate", note)
    more = run(tiny_data, tmp_path, search__budgets=(12,))
    assert set(less["cells"]) < set(more["cells"])
    reported = [name for name, cell in more["cells"].items() if "report" in cell]
    assert set(seen) - set(reported) == set(more["cells"]) - set(less["cells"]) - set(reported)


@pytest.mark.slow
def test_halving_drops_cells_and_says_so(found, tiny_data, tmp_path):
    """The cells that stay have the numbers of the whole search, by batches of another size.

    These round otherwise, and the network is a random one, so one video may fall the other way.
    """
    report = run(tiny_data, tmp_path, search__strategy="halving", eval__batch_size=2)
    dropped = {one["cell"]: one["videos"] for one in report["skipped"]}
    assert set(dropped.values()) == {2, 4}
    for name, cell in report["cells"].items():
        assert cell["choose"]["videos"] == dropped.get(name, VIDEOS["choose"])
    # Of three, four and one cells: 2, 2, 1 then one each.
    assert len(report["cells"]) - len(dropped) == 3
    (table,) = report["devices"].values()
    assert set(table["cells"]) == set(report["cells"]) - set(dropped)
    chosen = {own["select"] for own in report["chosen"].values()}
    assert not chosen & set(dropped)
    full = found[0]["cells"]
    for name in set(report["cells"]) - set(dropped):
        own, other = (dict(cells[name]) for cells in (report["cells"], full))
        for split in ("choose", "report"):
            if split in own and split in other:
                found, expected = own.pop(split), other.pop(split)
                assert found["videos"] == expected["videos"]
                assert abs(found["top1"] - expected["top1"]) <= 1 / found["videos"] + 1e-9, name
        for key in (own.keys() & other.keys()) - {"behind", "choose", "report"}:
            assert own[key] == other[key], (name, key)
    again = run(tiny_data, tmp_path, search__strategy="halving", eval__batch_size=2)
    assert without_times(again) == without_times(report)


@pytest.mark.slow
def test_merging_is_searched_beside_selection(tiny_data, compiled, tmp_path):
    report = run(tiny_data, tmp_path, search__merging=True, search__frames="6")
    merging = {n: cell for n, cell in report["cells"].items() if cell["method"] == "merge"}
    # Two blocks bring 54 tokens down to 14 at best.
    assert set(merging) == {"merge-24-6x42-h0", "merge-12-6x28-h1"}
    selecting = report["cells"]["select-12-6x28-h1"]
    assert merging["merge-12-6x28-h1"]["gflops"] > selecting["gflops"]
    for own in report["chosen"].values():
        assert own["merge"] in merging and own["over_merge"]["videos"] == VIDEOS["report"]


@pytest.mark.slow
def test_all_heads(tiny_data, compiled, tmp_path):
    report = run(tiny_data, tmp_path, search__heads="all", search__frames="4")
    names = {f"select-{b}-{grid}" for b, grid in ((24, "4x42"), (12, "4x42"), (12, "4x28"))}
    assert set(report["cells"]) == {f"{name}-h{head}" for name in names for head in (0, 1)}
    (table,) = report["devices"].values()
    for name in names:  # timed once
        assert table["cells"][f"{name}-h0"] == table["cells"][f"{name}-h1"]


@pytest.mark.slow
def test_devices_change_nothing(found, tiny_data, compiled, tmp_path):
    program = f"""
from pathlib import Path
import jax
from fluxvit_jax.token_optimization import latency
from tests.token_optimization.test_search import run

latency.WARM_UP_SECONDS = latency.SECONDS = 0
assert jax.device_count() == 4
run(Path({str(tiny_data)!r}), Path({str(tmp_path)!r}), search__frames="4", search__budgets=(12,))
"""
    done = limited.run(
        [sys.executable, "-c", program],
        env=tiny.environment(compiled, 4),
    )
    assert done.returncode == 0, done.stderr
    report, whole = read_report(tmp_path), found[0]
    assert len(report["cells"]) == 2
    for name, cell in report["cells"].items():
        assert cell["choose"] == whole["cells"][name]["choose"]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [4, 8])
def test_another_batch_size_goes_on_with_what_is_known(found, tiny_data, tmp_path, batch):
    """As the message about too little memory advises: no cell and no video is left out.

    Batches round otherwise, and the network is a random one, so one video may fall the other way.
    """
    few = {"search__budgets": (12,), "search__frames": "4"}
    run(tiny_data, tmp_path, eval__batch_size=6, **few)
    path = tmp_path / FILE
    header, *lines = path.read_text().splitlines()
    # It was stopped after one cell of the first chunk; the cells are two.
    first = next(line for line in lines if '"found"' in line)
    path.write_text(f"{header}\n{first}\n")
    report = run(tiny_data, tmp_path, eval__batch_size=batch, **few)
    assert len(report["cells"]) == 2
    for name, cell in report["cells"].items():
        expected = found[0]["cells"][name]["choose"]
        assert cell["choose"]["videos"] == VIDEOS["choose"]
        assert abs(cell["choose"]["top1"] - expected["top1"]) <= 1 / VIDEOS["choose"] + 1e-9
    tops = {name: cell["choose"]["top1"] for name, cell in report["cells"].items()}
    assert tops[report["chosen"]["12"]["select"]] == max(tops.values())
    assert report["cells"][report["chosen"]["12"]["select"]]["report"]["videos"] == VIDEOS["report"]
    assert report["cascades"]


# --- Kills ----------------------------------------------------------------------------------------

QUICK = """
import sys
from fluxvit_jax.token_optimization import latency
from fluxvit_jax.main import main
latency.WARM_UP_SECONDS = latency.SECONDS = 0
latency.FEWEST_CALLS = 2
sys.exit(main(sys.argv))
"""


def start(
    folder: Path, workdir: Path, cache: Path, *options: str, before: str = ""
) -> limited.Process:
    """`--mode=search` as a process, with timings that take no time, and code to run before."""
    command = [sys.executable, "-c", before + QUICK, f"--config={tiny.__file__}:{folder}"]
    command += [f"--workdir={workdir}", "--mode=search", "--config.search.frames=4"]
    return limited.Process(
        [*command, *options],
        env=tiny.environment(cache),
        cwd=tiny.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def copy_of(finished, tmp_path: Path, name: str) -> Path:
    workdir = tmp_path / name
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(finished.workdir / "checkpoints")
    (workdir / "config.json").write_bytes((finished.workdir / "config.json").read_bytes())
    return workdir


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_in_the_same_report(
    finished, tiny_data, compiled, tmp_path, capsys
):
    whole = copy_of(finished, tmp_path, "whole")
    status, out, log = outcome_here(
        capsys, tiny_data, whole, "--mode=search", "--config.search.frames=4"
    )
    assert status == 0, log
    assert "gain, 95 %" in out and "report.html" in out
    assert "warning: The cells are chosen on videos that training may have seen" in log
    lines = (whole / "search" / FILE).read_text().count("\n")

    killed = copy_of(finished, tmp_path, "killed")
    moment = random.Random(time.time()).randrange(1, lines)
    print("killed after line", moment)
    path = killed / "search" / FILE
    process = start(tiny_data, killed, compiled)
    written = lambda: path.read_text().count("\n") if path.exists() else 0  # noqa: E731
    assert limited.wait_until(lambda: written() >= moment, process), process.communicate()
    process.kill()
    process.communicate()
    path.write_bytes(path.read_bytes() + b'{"split": "choose", "first')  # a line cut short
    _, log = start(tiny_data, killed, compiled).communicate()
    assert path.read_text().count("\n") == lines, log  # nothing was done twice
    reports = [json.loads((run / "search/report.json").read_text()) for run in (whole, killed)]
    assert without_times(reports[0]) == without_times(reports[1])
    rows = [(run / "search/report.csv").read_text().splitlines() for run in (whole, killed)]
    assert len(rows[0]) == len(rows[1]) == len(reports[0]["cells"]) + 1
    for run_ in (whole, killed):
        assert {p.name for p in (run_ / "search").iterdir()} == {
            FILE,
            "probabilities",
            *(f"report.{kind}" for kind in ("json", "html", "csv", "png")),
        }


# Chunk by chunk: the second one has a video that is never read.
HANGING = """
import time

from fluxvit_jax.token_optimization import frame_reader

def read_for_ever(video, *rest):
    if video.name.endswith("/4.mp4"):
        time.sleep(60)
    return read(video, *rest)

read, frame_reader.read_frames = frame_reader.read_frames, read_for_ever
"""


@pytest.mark.slow
def test_a_search_that_hangs_ends(finished, tiny_data, compiled, tmp_path):
    workdir = copy_of(finished, tmp_path, "run")
    options = ("--config.search.budgets=(12,)", "--config.eval.batch_size=4")
    limits = ("--config.data.clip_seconds=0", "--config.log.watchdog_seconds=2")
    process = start(tiny_data, workdir, compiled, *options, *limits, before=HANGING)
    _, log = process.communicate()
    assert process.returncode == STATUS, log
    assert "error: nothing was finished for 2 s (config.log.watchdog_seconds)" in log
    assert "in read_for_ever" in (workdir / "stacks.txt").read_text()


def test_videos_that_hang_or_crash_their_reader_count_as_failed(tiny_data):
    """With the reasons that training and evaluation give."""
    grids = (Grid(4, 2, 2), Grid(2, 3, 3))
    config = make_config(tiny_data, data__workers=2, data__clip_seconds=1.0)
    source = open_source(config.search.split, "", 4)
    tasks = [(number, grids, 0) for number in range(18)]
    with FrameReader(config, source, len(tasks), open_fatal) as reader:
        reader.start(tasks)
        videos = [reader.take(task) for task in tasks]
    assert {f"{v.number}.mp4": v.failure for v in videos if v.failure} == REASONS
    with FrameReader(make_config(tiny_data), source, len(tasks)) as reader:
        plain = [reader.take(task) for task in tasks]
    assert [video.number for video in plain] == [*range(16), -1, -1]
    for video, own in zip(videos, plain, strict=True):
        assert (video.number, video.is_too_large) == (own.number, False)
        if video.frames is not None:
            assert video.label == own.label
            np.testing.assert_array_equal(video.frames.pixels, own.frames.pixels)


# --- --config.eval.plan ---------------------------------------------------------------------------


def test_a_plan_is_evaluated(finished, tiny_data, compiled, tmp_path):
    workdir = copy_of(finished, tmp_path, "run")
    report = run(
        tiny_data,
        workdir / "search",
        load_weights(make_config(tiny_data), workdir),
        search__heads="all",
        search__frames="4",
    )
    config = make_config(tiny_data, eval__plan=str(workdir))
    assert tasks.run(make_config(tiny_data), str(workdir)) == 0
    plain, _ = tiny.read_evaluation(workdir)
    assert tasks.run(config, str(workdir)) == 0
    evaluation, _ = tiny.read_evaluation(workdir)
    assert (plain["plan"], evaluation["plan"]) == (None, str(workdir))
    reports = {path.name: path for path in (workdir / "evaluation").glob("*.json")}
    (name,) = [name for name in reports if "-validation-plan-" in name]
    (other,) = reports.keys() - {name}
    assert json.loads(reports[name].read_text()) == evaluation
    assert json.loads(reports[other].read_text()) == plain
    for budget, own in report["chosen"].items():
        cell, alone = report["cells"][own["select"]], evaluation["budgets"][budget]
        for name in ("frames", "resolution", "tokens", "head"):
            assert alone[name] == cell[name]
        assert (alone["top1"], alone["top5"]) == (cell["report"]["top1"], cell["report"]["top5"])


def test_a_plan_of_other_weights_is_refused(found, finished, tiny_data, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(found[0]))
    config = make_config(tiny_data, eval__plan=str(path))
    with pytest.raises(UserError, match=r"report.json: its report is of other weights \(random\)"):
        tasks.run(config, str(finished.workdir))
    path.write_text(path.read_text()[:-100])
    with pytest.raises(UserError, match=r"report.json: cannot be read"):
        tasks.run(config, str(finished.workdir))


# --- What chooses and what reports ----------------------------------------------------------------


def notes_of(folder: Path, trained: dict | None = None, **changes) -> tuple[list, list[str]]:
    weights = Weights({}, "none", trained)
    splits, notes = search.splits_of(make_config(folder, **changes), weights)
    return [(split.name, split.data, len(split.source)) for split in splits], notes


def test_by_default_what_training_left_out_chooses(tiny_data):
    train = str(tiny_data / "train.csv")
    default = {"search__split": "", "data__train": train, "data__holdout_fraction": 0.25}
    trained = {"data": {"held_out": 0.25}}
    splits, notes = notes_of(tiny_data, trained, **default)
    assert splits == [
        ("choose", f"4 of 16 videos, {train}", 4),
        ("report", str(tiny_data / "validation.csv"), 13),
    ]
    assert notes == []
    for other in (None, {"data": {}}, {"data": {"held_out": 0.1}}):
        _, (note,) = notes_of(tiny_data, other, **default)
        assert "videos that training may have seen" in note
    splits, (note,) = notes_of(tiny_data, trained, **default | {"data__holdout_fraction": 0.0})
    assert splits[0] == ("choose", train, 16) and "may have seen" in note
    splits, _ = notes_of(tiny_data, search__videos=7)
    assert splits[0] == ("choose", f"7 of 16 videos, {train}", 7)


@pytest.mark.slow
def test_training_never_sees_what_chooses(tiny_data, compiled, tmp_path, capsys):
    config = tiny.make_config(
        tiny_data,
        data__holdout_fraction=0.25,
        train__epochs=1,
        train__budgets=(12,),
        search__budgets=(12,),
        search__frames="4",
    )
    with noting_openings() as opened:
        assert train.train(config, tmp_path) == 0
    validation = {f"{i}.mp4" for i in range(16, 28)} | {tiny.BAD}
    trained_on = set(opened) - validation
    assert len(trained_on) == 12
    with noting_openings() as opened:
        assert search.run(config, str(tmp_path)) == 0
    assert set(opened) - validation == {f"{i}.mp4" for i in range(16)} - trained_on
    (note,) = read_report(tmp_path)["notes"]
    assert note.startswith("Reporting split: 1 of 13 videos could not be read")
    assert capsys.readouterr().out.splitlines()[-1] == f"warning: {note}"


def test_what_is_shared_is_said_and_counted(tiny_data, tmp_path):
    _, (note,) = notes_of(tiny_data, search__split=str(tiny_data / "validation.csv"))
    assert "chosen on the list that is reported" in note
    mixed = tmp_path / "mixed.csv"
    rows = (tiny_data / "validation.csv").read_text().splitlines()
    mixed.write_text("\n".join([*rows[1:3], "0.mp4,0", "1.mp4,1", "2.mp4,2"]) + "\n")
    train = str(tiny_data / "train.csv")
    _, notes = notes_of(
        tiny_data, data__validation=str(mixed), data__train=train, data__root=str(tiny_data)
    )
    assert notes == [
        "3 videos that chose the cells are in the list that is reported.",
        "3 of 5 reported videos are in the training list.",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__validation": ""}, "no data to report on: add --config.data.validation"),
        ({"search__split": ""}, "nothing to choose on: add --config.search.split=LIST"),
        ({"search__split": "none.csv"}, "none.csv: no such file"),
        (
            {"search__split": "", "data__train": "train.csv", "data__holdout_fraction": 0.01},
            "there are no videos to choose or to report on",
        ),
    ],
)
def test_missing_data(tiny_data, changes, message, monkeypatch):
    monkeypatch.chdir(tiny_data)
    with pytest.raises(UserError, match=message):
        notes_of(tiny_data, **changes)


@pytest.mark.parametrize("split", ["choose", "validation"])
def test_a_split_of_which_nothing_can_be_read_is_refused(finished, tiny_data, tmp_path, split):
    """At once: its cells would all be equal, and an accuracy of 0 % of no network."""
    workdir = copy_of(finished, tmp_path, "run")
    missing = tmp_path / "missing.csv"
    missing.write_text("none/a.mp4,0\nnone/b.mp4,1\n")
    name = {"choose": "search__split", "validation": "data__validation"}[split]
    config = make_config(tiny_data, **{name: str(missing)})
    message = f"missing.csv: not one of 2 videos can be read; none/.*looked for in {tmp_path},"
    with pytest.raises(UserError, match=message):
        search.run(config, str(workdir))
    assert not (workdir / "search").exists()


def test_results_of_another_checkpoint_are_refused(found, tiny_data, tmp_path):
    run(tiny_data, tmp_path, search__budgets=(12,), search__frames="4")
    config = make_config(tiny_data)
    other = Weights(random_params(config, seed=6), "random", None)
    with pytest.raises(UserError, match="holds results of another weights; remove"):
        run(tiny_data, tmp_path, other)


def test_probabilities_without_results_are_not_taken_over(tiny_data, tmp_path):
    """They may be of other weights: a damaged log is removed, and what is beside it stays."""
    config, folder = make_config(tiny_data), epath.Path(tmp_path)
    ProbabilityStore(folder).add("choose", 0, search.MOTION, np.zeros((4, 1, 1)))
    weights = weights_of(config)
    splits, notes = search.splits_of(config, weights)
    with search.Search(config, weights, splits, notes, folder, Watchdog(0, folder)):
        assert not ProbabilityStore(folder).has("choose", 0, 4, search.MOTION)


def test_a_wrong_command_line_is_one_line(finished, tiny_data, tmp_path, capsys):
    workdir = copy_of(finished, tmp_path, "wrong")
    options = ("--mode=search", "--config.search.budgets=(9999,)")
    status, _, log = outcome_here(capsys, tiny_data, workdir, *options)
    assert status == 2
    assert log.splitlines()[-1].startswith("error: config.search.budgets: no grid can fill 9999")
    assert textwrap.shorten(log, 10_000).count("Traceback") == 0
