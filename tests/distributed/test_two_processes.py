"""Whole runs of two processes on one machine: what they leave is what one process leaves."""

import json
import re
import shutil
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from fluxvit_jax.adaptive import cascade
from fluxvit_jax.adaptive.cascade import Cascade, Step
from fluxvit_jax.checkpoints.checkpointer import restore_params
from fluxvit_jax.distributed.watchdog import STATUS
from fluxvit_jax.evaluation import tasks
from fluxvit_jax.token_optimization import latency, search
from fluxvit_jax.training import train
from tests import hosts, limited, tiny
from tests.token_optimization.test_search import without_times
from tests.training.test_train import saved_steps, split_of, unfinish

STEPS = 8
# Eight steps on 17 videos, evaluated after four and eight on 13; one of each cannot be read.
RUN = (
    "--config.train.batch_size=16",
    "--config.train.epochs=4",
    "--config.train.budgets=(24,)",
    "--config.eval.settings=((24,6,42),)",
    "--config.data.max_bad_fraction=0.5",
    "--config.checkpoint.every_steps=4",
    "--config.checkpoint.keep=9",
)


def arguments(folder: Path | str, workdir: Path | str, *more: str) -> list[str]:
    """Of the run, on the data of `folder`."""
    recipe = f"--config={tiny.__file__}:{folder}"
    data = f"--config.data.train={folder}/train_bad.csv"
    return [recipe, f"--workdir={workdir}", data, *RUN, *more]


def options(folder: Path) -> dict:
    """The same, for `tiny.make_config`."""
    return {
        "data__train": f"{folder}/train_bad.csv",
        "train__batch_size": 16,
        "train__budgets": (24,),
        "eval__settings": ((24, 6, 42),),
        "data__max_bad_fraction": 0.5,
    }


# What of `RUN` other tests do not need, for a run of one process.
ALONE = {"train__epochs": 4, "checkpoint__every_steps": 4, "checkpoint__keep": 9}


@pytest.fixture(scope="module")
def pair(tiny_data, compiled, tmp_path_factory) -> Path:
    """The workdir of the run by two processes with two devices each. Read only."""
    folder = tmp_path_factory.mktemp("pair")
    for ended in hosts.run(folder / "logs", compiled, *arguments(tiny_data, folder / "run")):
        assert ended.status == 0, ended.err
    return folder / "run"


def assert_same_metrics(workdir: Path, other: Path, missing: int = 0) -> None:
    """missing: step that the first one has no line for."""
    ours, theirs = (tiny.read_lines(run / "metrics.jsonl") for run in (workdir, other))
    theirs = [line for line in theirs if line["step"] != missing]
    assert len(ours) == len(theirs) == STEPS + 2 - (missing > 0)
    for own, line in zip(ours, theirs, strict=True):
        assert own.keys() == line.keys() and own["split"] == line["split"]
        for name in own.keys() - {"split"}:
            np.testing.assert_allclose(own[name], line[name], rtol=1e-5, err_msg=f"{name}, {own}")


# --- A run


def test_hosts_change_nothing(pair, tiny_data, compiled, tmp_path):
    """Metrics, bad clips and accuracies of two hosts and of one process with one device."""
    alone = tmp_path / "alone"
    assert train.train(tiny.make_config(tiny_data, **options(tiny_data) | ALONE), alone) == 0
    assert_same_metrics(pair, alone)
    for name in ("bad_clips.jsonl", "config.json"):
        ours, theirs = ((run / name).read_text() for run in (pair, alone))
        assert ours.replace(str(pair), "") == theirs.replace(str(alone), "")
    assert saved_steps(pair) == saved_steps(alone) == [4, 8]


def test_only_the_first_host_writes(pair):
    assert {path.name for path in pair.iterdir()} == {
        *("checkpoints", "config.json", "metrics.jsonl", "bad_clips.jsonl", "tensorboard"),
        "goodput.json",
    }
    assert len(list((pair / "tensorboard").iterdir())) == 1
    first, second = ((pair.parent / "logs" / f"{host}.err").read_text() for host in (0, 1))
    assert f"step {STEPS}/{STEPS}" in first and not second


def test_checkpoints_are_written_by_all(pair):
    written = {path.name for path in (pair / f"checkpoints/{STEPS}/state").iterdir()}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= written
    assert len(split_of(pair, "train")) == STEPS


# --- Going on elsewhere

SHAPES = """
import sys
from pathlib import Path

import jax
import numpy as np

from fluxvit_jax.training import optimizer as optim
from fluxvit_jax.distributed import mesh as parallel
from fluxvit_jax.checkpoints.checkpointer import Checkpoints
from fluxvit_jax.training.train_state import abstract_params, abstract_state
from tests.distributed import test_two_processes as test_hosts
from tests import tiny

data, source, out = map(Path, sys.argv[1:])
config = tiny.make_config(data, **test_hosts.options(data))
optimizer = optim.make_optimizer(config, 8, abstract_params(config))


def restored(workdir, **sides):
    for axis in parallel.AXES:
        config.parallel.mesh[axis] = sides[axis]
    mesh = parallel.make_mesh(config, jax.devices()[: np.prod(list(sides.values()))])
    with Checkpoints(workdir, 1, 1) as checkpoints:
        return checkpoints.restore_latest(abstract_state(config, optimizer, mesh))


def values(state):
    leaves, _ = jax.tree.flatten(state)
    return [np.asarray(leaf) for leaf in leaves]


step, state, position = restored(source, data=1, fsdp=1, tensor=1)
first = values(state)
shapes = [(1, 8, 1), (1, 1, 2), (2, 2, 2), (8, 1, 1)]
for number, shape in enumerate(shapes):
    sides = dict(zip(parallel.AXES, shape))
    own_step, state, own_position = restored(source, **sides)
    assert (own_step, own_position) == (step, position)
    cut = [leaf for leaf in jax.tree.leaves(state) if not leaf.is_fully_replicated]
    assert bool(cut) == (shape[1] * shape[2] > 1), shape
    for own, other in zip(values(state), first, strict=True):
        np.testing.assert_array_equal(own, other)
    source = out / str(number)  # the next shape goes on from this one
    with Checkpoints(source, 1, 1) as checkpoints:
        checkpoints.save(step, state, position, config)
print(len(first))
"""


@pytest.mark.slow
def test_a_state_is_the_same_on_any_mesh(pair, tiny_data, compiled, tmp_path):
    """Of two hosts, then from shape to shape: data, FSDP and tensor parallel, and together."""
    done = limited.run(
        [sys.executable, "-c", SHAPES, str(tiny_data), str(pair), str(tmp_path)],
        env=tiny.environment(compiled, 8),
        cwd=tiny.ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 100


# Host 1 is killed before its first step.
KILLED = """
import os
import signal
import sys

from fluxvit_jax.distributed import mesh as parallel
from fluxvit_jax.training import train
from fluxvit_jax.main import main


def killed(*arguments, **options):
    if parallel.host_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)


real, train.device_batch = train.device_batch, killed
sys.exit(main())
"""
# At some batch the readers of one host hang. Then the other one, which waits for it, gets a signal:
# after a second it has long begun to wait.
HANGING = """
import multiprocessing, os, signal, sys, threading
from fluxvit_jax.data import pipeline
from fluxvit_jax.distributed.mesh import host_index
from fluxvit_jax.main import main

def next_unless(batches, stop):
    evaluates = hasattr(batches._items._items, "views")
    if {when}:
        if host_index() == {hangs}:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGSTOP)
            batches._arrived.clear()
        else:
            threading.Timer(1, os.kill, (os.getpid(), signal.{name})).start()
    return real(batches, stop)

real, pipeline.Batches.next_unless = pipeline.Batches.next_unless, next_unless
if __name__ == "__main__":
    sys.exit(main())
"""


WITH_A_READER = ("--config.data.workers=1", "--config.data.clip_seconds=0")


@pytest.mark.slow
def test_a_run_that_one_host_stopped_goes_on_elsewhere(pair, tiny_data, compiled, tmp_path, capsys):
    """From data parallel to a pair of tensor parallel devices, on a host each, with equal clips.

    There the reader of one host hangs, without a time limit, and SIGTERM comes to the other one;
    then one process goes on. States on other meshes: the test before this one, and test_mesh.py.
    """
    workdir = shutil.copytree(pair, tmp_path / "run")
    unfinish(workdir, 4)
    more = ["--config.log.every_steps=5", "--config.parallel.mesh.tensor=2"]
    tensor = arguments(tiny_data, workdir, *WITH_A_READER, *more)
    when = "not evaluates and batches.state()['step'] == 6"
    code = HANGING.format(hangs=1, when=when, name="SIGTERM")
    both = hosts.run(tmp_path / "logs", compiled, *tensor, code=code, devices=1)
    assert [ended.status for ended in both] == [128 + signal.SIGTERM] * 2, both[0].err
    assert "going on from step 4 of 8" in both[0].err
    # Steps 7 and 8 were done in vain: host 0 had begun them.
    assert "stopped at step 6; the same command goes on from there" in both[0].err
    assert saved_steps(workdir) == [4, 6]

    assert train.train(tiny.make_config(tiny_data, **options(tiny_data) | ALONE), workdir) == 0
    assert "going on from step 6 of 8" in capsys.readouterr().err
    assert_same_metrics(workdir, pair, missing=6)


@pytest.mark.slow
def test_a_run_of_which_a_host_was_killed_goes_on_as_undisturbed(
    pair, tiny_data, compiled, tmp_path
):
    """And Ctrl-C comes to one while the other one's reader hangs, in the evaluation at the end."""
    workdir = shutil.copytree(pair, tmp_path / "run")
    unfinish(workdir, 4)
    command = arguments(tiny_data, workdir)
    both = hosts.run(tmp_path / "logs", compiled, *command, code=KILLED)
    assert [ended.status for ended in both] == [STATUS, -signal.SIGKILL], both[0].err
    (error,) = both[0].errors
    assert error.startswith("error: host 1 has died without a word")
    assert "stack trace" not in both[0].err and "Traceback" not in both[0].err

    code = HANGING.format(hangs=0, when="evaluates", name="SIGINT")
    both = hosts.run(tmp_path / "logs", compiled, *command, *WITH_A_READER, code=code)
    assert [ended.status for ended in both] == [128 + signal.SIGINT] * 2, both[0].err
    assert "going on from step 4 of 8" in both[0].err
    assert "stopped at step 8; the same command goes on from there" in both[0].err
    first, second = (tiny.read_lines(run / "metrics.jsonl") for run in (workdir, pair))
    assert first == second[:-1]  # all but the last evaluation
    ours, theirs = (restore_params(run / f"checkpoints/{STEPS}") for run in (workdir, pair))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# --- Evaluation and search


@pytest.mark.slow
def test_an_evaluation_counts_every_video_once(pair, tiny_data, compiled, tmp_path):
    """Thirteen videos for four devices of two hosts."""
    found = []
    for name in ("pair", "alone"):
        workdir = shutil.copytree(pair, tmp_path / name)
        if name == "pair":
            command = arguments(tiny_data, workdir, "--mode=evaluate")
            both = hosts.run(tmp_path / "logs", compiled, *command)
            assert [ended.status for ended in both] == [0, 0], both[0].err + both[1].err
            assert "videos could not be read" in both[0].out
            assert "budget" in both[0].out and "budget" not in both[1].out
        else:
            assert tasks.run(tiny.make_config(tiny_data, **options(tiny_data)), workdir) == 0
        found.append(tiny.read_evaluation(workdir))
    (report, predictions), (other, theirs) = found
    losses = [row.pop("loss") for own in (report, other) for row in own["budgets"].values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for own, their in zip(report["budgets"].values(), other["budgets"].values(), strict=True):
        calibrated, theirs_calibrated = own.pop("calibration"), their.pop("calibration")
        bins, their_bins = calibrated.pop("bins"), theirs_calibrated.pop("bins")
        assert calibrated == pytest.approx(theirs_calibrated, rel=1e-3)
        assert bins["count"] == their_bins["count"] and sum(bins["count"]) == own["decoded"]
    assert report == other and report["dataset"]["videos"] == len(predictions) == 13
    for own, line in zip(predictions, theirs, strict=True):
        assert own["id"] == line["id"] and own.get("failure") == line.get("failure")
        for budget, top in own.get("predictions", {}).items():
            np.testing.assert_allclose(top, line["predictions"][budget], atol=1e-5)


@pytest.mark.slow
def test_a_cascade_stops_where_it_does_on_one_host(pair, tiny_data, compiled, tmp_path):
    """How many videos go on differs by host, and so do their batches."""
    file, found = tmp_path / "cascade.json", []
    for name in ("alone", "pair"):
        workdir = shutil.copytree(pair, tmp_path / name)
        changes = {"eval__cascade": str(file), "eval__settings": ((12, 4, 28),)}
        config = tiny.make_config(tiny_data, **options(tiny_data) | changes)
        if name == "alone":
            config.eval.cascade = ""
            assert tasks.run(config, workdir) == 0
            _, lines = tiny.read_evaluation(workdir)
            sure = sorted(row["predictions"]["12"][0][1] for row in lines if "failure" not in row)
            first = Step(budget=12, frames=4, resolution=28, head=0, threshold=sum(sure[4:6]) / 2)
            last = Step(budget=24, frames=6, resolution=42, head=0)
            cascade.write(Cascade((first, last)), file)
            shutil.rmtree(workdir / "evaluation")
            config.eval.cascade = str(file)
            assert tasks.run(config, workdir) == 0
        else:
            command = arguments(
                tiny_data, workdir, "--mode=evaluate", f"--config.eval.cascade={file}"
            )
            both = hosts.run(tmp_path / "logs", compiled, *command)
            assert [ended.status for ended in both] == [0, 0], both[0].err + both[1].err
            assert "answer here" in both[0].out and "answer here" not in both[1].out
        found.append(tiny.read_evaluation(workdir))
    (report, predictions), (other, theirs) = found
    assert [row.get("step") for row in predictions] == [row.get("step") for row in theirs]
    assert {row["step"] for row in predictions if "failure" not in row} == {1, 2}
    (own,), (their,) = (list(one["budgets"].values()) for one in (report, other))
    for calibrated in (own["calibration"], their["calibration"]):
        calibrated.pop("bins")
    assert own.pop("calibration") == pytest.approx(their.pop("calibration"), rel=1e-3)
    assert own.pop("answered") == their.pop("answered")
    assert own == pytest.approx(their, rel=1e-4)
    assert report["failures"] == other["failures"]


QUICK_TIMING = """
import sys
from fluxvit_jax.token_optimization import latency
from fluxvit_jax.main import main
latency.WARM_UP_SECONDS = latency.SECONDS = 0
latency.FEWEST_CALLS = 2
sys.exit(main())
"""


@pytest.mark.slow
def test_a_search_goes_on_with_two_hosts(pair, tiny_data, compiled, tmp_path, monkeypatch):
    """One process began it, and its kill left half of the lines."""
    monkeypatch.setattr(latency, "WARM_UP_SECONDS", 0)
    monkeypatch.setattr(latency, "SECONDS", 0)
    monkeypatch.setattr(latency, "FEWEST_CALLS", 2)
    workdir = shutil.copytree(pair, tmp_path / "run")
    cells = {"search__budgets": (12,), "search__frames": "4"}
    config = tiny.make_config(tiny_data, **options(tiny_data), eval__batch_size=8, **cells)
    assert search.run(config, workdir) == 0
    report, path = workdir / "search/report.json", workdir / "search/cells.jsonl"
    whole, lines = json.loads(report.read_text()), path.read_text().splitlines()
    assert len(lines) > 8

    path.write_text("\n".join([*lines[: len(lines) // 2], '{"split": "choose", "first']))
    report.unlink()
    more = ["--mode=search", "--config.eval.batch_size=8"]
    more += ["--config.search.budgets=(12,)", "--config.search.frames=4"]
    command = arguments(tiny_data, workdir, *more)
    both = hosts.run(tmp_path / "logs", compiled, *command, code=QUICK_TIMING)
    assert [ended.status for ended in both] == [0, 0], both[0].err + both[1].err
    assert without_times(json.loads(report.read_text())) == without_times(whole)
    # Each line once, but for those of times.
    now = path.read_text().splitlines()
    assert len(now) == len(lines)
    assert [line for line in now if "cost" not in line] == [x for x in lines if "cost" not in x]


# --- What a teacher makes of a plan

CACHING = """
import sys

from fluxvit_jax.training import cache_targets as cache
from fluxvit_jax.main import main

def noted(self, number, *rest):
    print(number)
    write(self, number, *rest)

write, cache._Writer._write = cache._Writer._write, noted
cache.SHARD_BYTES = 250_000
sys.exit(main())
"""


@pytest.mark.slow
def test_a_cache_is_written_by_both(tiny_data, compiled, tmp_path):
    """Each writes shards of its own, and they are those that one process writes."""
    teacher, folders = tiny.write_teacher(tmp_path / "teacher"), [tmp_path / "1", tmp_path / "2"]
    written = []
    for count, folder in enumerate(folders, 1):
        told = hosts.run(
            tmp_path / f"logs {count}",
            compiled,
            f"--config={tiny.__file__}:{tiny_data},{teacher}",
            "--mode=cache",
            "--config.data.sampling_period_epochs=2",
            f"--config.distill.cache={folder}",
            code=CACHING,
            folders=hosts.ROOTS[:count],
            environments=hosts.NOTHING[:count],
        )
        assert [ended.status for ended in told] == [0] * len(told), told[0].err
        written.append([[int(line) for line in ended.out.split()] for ended in told])
    (all_shards,), (first, second) = written
    assert len(all_shards) > 2
    assert first == all_shards[::2] and second == all_shards[1::2]
    shards = sorted(path.name for path in folders[0].glob("*.array_record"))
    assert len(shards) == len(all_shards)
    for name in (*shards, "cache.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


# --- Other data on one host


@pytest.fixture
def folders(tiny_data, tmp_path) -> list[Path]:
    """A folder of the data for each of two hosts, to run in."""
    return [Path(shutil.copytree(tiny_data, tmp_path / f"host{host}")) for host in (0, 1)]


def shorter(folder: Path) -> None:
    path = folder / "train_bad.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-2]) + "\n")


def other_list(folder: Path) -> None:
    path = folder / "validation.csv"
    heading, first, second, *others = path.read_text().splitlines()
    path.write_text("\n".join([heading, second, first, *others]) + "\n")


def no_list(folder: Path) -> None:
    (folder / "validation.csv").unlink()


def broken(folder: Path) -> None:
    for number in range(16):  # all that train.csv lists
        video = folder / f"{number}.mp4"
        video.write_bytes(video.read_bytes()[:200])


# Tries one folder of data after another, each of which is refused before training; then the rest.
ONE_AFTER_ANOTHER = """
import os, sys
from fluxvit_jax.errors import UserError
from fluxvit_jax.main import main
from fluxvit_jax.training import train

def train_in_each(*arguments, **options):
    for folder in {faults}:
        os.chdir(os.path.join(home, folder))
        try:
            real(*arguments, **options)
        except UserError as error:
            print(f"error: {{error}}", file=sys.stderr)
    os.chdir(home)
    return real(*arguments, **options)

home = os.getcwd()
real, train.train = train.train, train_in_each
sys.exit(main())
"""
FAULTS = {
    shorter: "host 1 has another number of training videos than host 0, 15 and not 17; start",
    other_list: "host 1 has another list of validation videos than host 0, ",
    no_list: r"^error: (host 1: )?validation.csv: no such file or folder$",
}


@pytest.mark.slow
def test_other_data_on_one_host(folders, compiled, tmp_path):
    """All hosts say what is wrong with one of them, which reads in processes of its own."""
    for number, folder in enumerate(folders):
        for fault in FAULTS:
            (folder / fault.__name__).mkdir()
            for file in folder.glob("*.*"):
                shutil.copy(file, folder / fault.__name__)
            if number == 1:
                fault(folder / fault.__name__)
    broken(folders[1])
    command = arguments(".", tmp_path / "run", "--config.data.workers=1")
    code = ONE_AFTER_ANOTHER.format(faults=[fault.__name__ for fault in FAULTS])
    both = hosts.run(tmp_path / "logs", compiled, *command, code=code, folders=folders)
    last = r"^error: (host 1: )?config.data.train: 9 videos in a row cannot be read; "
    for ended in both:
        assert ended.status == 2, ended.err
        for error, message in zip(ended.errors, [*FAULTS.values(), last], strict=True):
            assert re.search(message, error), error
        assert "Traceback" not in ended.err
    assert all("host 1" in error for error in both[0].errors)
    assert not (tmp_path / "run/metrics.jsonl").exists()
