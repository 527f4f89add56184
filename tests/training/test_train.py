"""Whole runs on real files: they learn, and neither kills nor devices nor bad files change them."""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from benchmarks.soak import workers_of
from fluxvit_jax.checkpoints import checkpointer
from fluxvit_jax.checkpoints.checkpointer import Checkpoints, check_fit, restore_params
from fluxvit_jax.checkpoints.weights import read_weights
from fluxvit_jax.config.grids import admissible_grids
from fluxvit_jax.config.network import model_config
from fluxvit_jax.convert import official_names, weight_files
from fluxvit_jax.convert.adapt import resize_positions
from fluxvit_jax.data import class_names, pipeline
from fluxvit_jax.deploy.pretrained import from_pretrained
from fluxvit_jax.distributed.devices import device_name
from fluxvit_jax.distributed.mesh import make_mesh, shard_batch
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import tasks
from fluxvit_jax.grids import Grid, capacity
from fluxvit_jax.models import fluxvit
from fluxvit_jax.training import init_from, nonfinite, setup, train, validation, wording
from fluxvit_jax.training import train_step as steps
from fluxvit_jax.training.optimizer import learning_rates, make_optimizer
from fluxvit_jax.training.preemption import PreemptionHandler
from fluxvit_jax.training.train_state import abstract_params, initial_state
from tests import limited, tiny

STEPS = 20
KILLED = "a worker that reads data was killed by SIGKILL, as happens when memory runs out; "


def split_of(workdir, split: str) -> list[dict]:
    return [line for line in tiny.read_lines(workdir / "metrics.jsonl") if line["split"] == split]


def steps_in(workdir) -> int:
    """The last step that the metrics have; 0 before the first."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def saved_steps(workdir) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def copy_of(workdir, target):
    """A copy of a finished run, to go on with."""
    return shutil.copytree(workdir, target)


def unfinish(workdir, step: int) -> None:
    """Takes a run back to an earlier checkpoint."""
    for later in saved_steps(workdir):
        if later > step:
            shutil.rmtree(workdir / "checkpoints" / str(later))


# --- A run


def test_a_run_learns(finished):
    losses = [line["loss"] for line in split_of(finished.workdir, "train")]
    assert len(losses) == STEPS
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])
    validation = split_of(finished.workdir, "validation")
    assert [line["step"] for line in validation] == [8, 16, 20]
    assert validation[-1]["top1_24"] > 0.6 and validation[-1]["top1_12"] > 0.6
    assert validation[-1]["failed"] == 1
    assert 0 < validation[-1]["loss_24"] < validation[0]["loss_24"] < 3


def test_the_logged_learning_rate_is_that_of_the_step(finished):
    """A line from 1e-6 up to 2e-3 over the four steps of an epoch, then half a cosine over 16."""
    config = json.loads((finished.workdir / "config.json").read_text())["optim"]
    low, high = config["warmup_learning_rate"], config["learning_rate"]
    last = config["min_learning_rate"]
    assert (low, high, last) == (1e-6, 2e-3, 1e-6)
    expected = [low + (high - low) * step / 3 for step in range(4)]
    expected += [last + (high - last) * (1 + math.cos(math.pi * n / 16)) / 2 for n in range(16)]
    logged = [line["learning_rate"] for line in split_of(finished.workdir, "train")]
    np.testing.assert_allclose(logged, expected, rtol=1e-6)


def test_what_a_run_leaves(finished, tiny_data):
    workdir = finished.workdir
    assert {p.name for p in workdir.iterdir()} >= {
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "tensorboard",
    }
    assert "1 compiled training step for 20 grids, capacity P=99" in finished.log
    assert "data: 16 videos of 4 classes to train on, 13 to validate on\n" in finished.log
    assert "schedule: 5 epochs of 4 steps, 8 clips a step\n" in finished.log
    assert "tokens: budgets of 24, 12, selected from the 8 to 99 of 20 grids\n" in finished.log
    assert f"workdir: {workdir}\n" in finished.log
    assert f"training on 1 x {device_name()}" in finished.log
    parameters = sum(x.size for x in jax.tree.leaves(restore_params(workdir)))
    assert f"parameters: {parameters:,} ({parameters:,} trained, 0 frozen)" in finished.log
    assert re.search(r"\n  blocks +100,096\n", finished.log)
    average, last = restore_params(workdir), restore_params(workdir, average=False)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (average, last)), strict=True))
    assert {18, 20} <= set(saved_steps(workdir))  # the latest two, and the best


def test_a_finished_run_tells_the_best_and_what_to_type_next(finished):
    lines = split_of(finished.workdir, "validation")
    best = max(lines, key=lambda line: (line["top1_24"], line["step"]))
    shares = f"{best['top1_24']:.2%} at 24 tokens, {best['top1_12']:.2%} at 12 tokens"
    assert f"best checkpoint: step {best['step']}, top-1 {shares}\n" in finished.log
    assert f"--mode=evaluate --workdir={finished.workdir}\n" in finished.log
    assert "top5" not in finished.log  # of four classes


@pytest.mark.slow
def test_more_epochs_for_a_finished_run(finished, tiny_data, compiled, tmp_path, capsys):
    workdir = copy_of(finished.workdir, tmp_path / "run")
    config = tiny.make_config(tiny_data, train__epochs=6)
    assert train.train(config, workdir) == 0
    rates = learning_rates(config, 24)
    last = split_of(finished.workdir, "train")[-1]["learning_rate"]
    assert (
        "6 epochs in place of 5: the learning rate goes on along the new schedule: "
        f"{last:.3g} before, {rates[20]:.3g} now, {rates[23]:.3g} at the end"
    ) in capsys.readouterr().err
    lines = split_of(workdir, "train")
    assert lines[:20] == split_of(finished.workdir, "train")
    assert [line["learning_rate"] for line in lines[20:]] == pytest.approx(rates[20:])
    with pytest.raises(UserError, match=r"train\.epochs: 6 -> 5"):
        train.train(tiny.make_config(tiny_data), workdir)


def test_a_new_schedule_goes_by_the_steps_that_were_not_skipped(finished, tiny_data):
    """The rates that are told are those of the steps before and after, and of the last one."""
    config = tiny.make_config(tiny_data, optim__learning_rate=1e-3)
    setup = SimpleNamespace(
        config=config,
        workdir=finished.workdir,
        rates=learning_rates(config, 20),
        schedule=SimpleNamespace(steps_per_epoch=4, total=20),
    )
    before = learning_rates(tiny.make_config(tiny_data), 20)
    said = wording.describe_new_schedule(setup, 10, {"total_steps": 20, "skipped_steps": [3, 2]})
    assert said.endswith(
        f"{before[6]:.3g} before, {setup.rates[7]:.3g} now, {setup.rates[16]:.3g} at the end"
    )


def test_a_finished_run_says_so(finished, tiny_data, capsys):
    assert train.train(tiny.make_config(tiny_data), finished.workdir) == 0
    assert "is finished: all 20 steps are done" in capsys.readouterr().err


def test_another_config_is_refused(finished, tiny_data):
    config = tiny.make_config(tiny_data, train__epochs=4, log__every_steps=3)
    with pytest.raises(UserError, match=r"another config \(train.epochs: 5 -> 4\)"):
        train.train(config, finished.workdir)


# --- Stopping early


@pytest.mark.parametrize(
    "accuracies, patience, best",
    [
        ([], 8, None),
        ([0.5], 8, None),
        ([0.5, 0.5], 0, None),  # never
        ([0.5, 0.5], 8, None),
        ([0.5, 0.5, 0.5], 8, 4),  # the first of equals is the best
        ([0.5, 0.6, 0.4], 8, None),
        ([0.5, 0.6, 0.4, 0.5], 8, 8),
    ],
)
def test_patience_is_counted_from_the_best_step(accuracies, patience, best):
    validations = [[4 * number, accuracy] for number, accuracy in enumerate(accuracies, 1)]
    reason = validation.early_stop(validations, patience, "top1_24")
    assert reason == (
        f"because top1_24 has not risen above {max(accuracies)} since step {best}" if best else ""
    )


def test_of_a_loss_less_is_better():
    validations = [[4, 2.5], [8, 2.0], [12, 2.25], [16, 2.5]]
    assert not validation.early_stop(validations[:3], 8, "loss_24", falls=True)
    reason = validation.early_stop(validations, 8, "loss_24", falls=True)
    assert reason == "because loss_24 has not fallen below 2 since step 8"


@pytest.mark.slow
def test_a_run_that_no_longer_improves_stops_early(tiny_data, compiled, tmp_path, capsys):
    """At a rate that changes nothing, from a list of unequal classes, whose weights are said."""
    (tmp_path / "train.csv").write_text(
        "".join(f"{number}.mp4,{max(0, number - 12)}\n" for number in range(16))
    )
    config = tiny.make_config(
        tiny_data,
        data__train=str(tmp_path / "train.csv"),
        data__root=str(tiny_data),
        train__class_weights="balanced",
        train__early_stopping_epochs=1,
        train__budgets=(24,),
        eval__settings=((24, 6, 42),),
        eval__every_epochs=1,
        optim__learning_rate=1e-12,
        optim__min_learning_rate=0.0,
        optim__warmup_learning_rate=0.0,
    )
    assert train.train(config, tmp_path / "run") == 0
    log = capsys.readouterr().err
    assert (
        "\nbalanced class weights from 0.308 to 4 in the loss; videos by class: 1 (class 1)" in log
    )
    assert re.search(r"\nstopped early at step 8 of 20, because top1_24 has not risen above", log)
    assert steps_in(tmp_path / "run") == saved_steps(tmp_path / "run")[-1] == 8
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()

    assert train.train(config, tmp_path / "run") == 0
    log = capsys.readouterr().err
    assert "is finished: it stopped early at step 8 of 20, because top1_24" in log
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


# --- Stopping and going on


def test_killed_and_resumed_is_as_undisturbed(finished, tiny_data, compiled, tmp_path, capsys):
    """Two workers before the kill, of which one is killed first, and none afterwards.

    SIGTERM is that of test_pretrain.py.
    """
    workdir = tmp_path / "run"
    process = tiny.start(tiny_data, workdir, compiled, "--config.data.workers=2")
    limited.wait_until(lambda: steps_in(workdir) >= 2, process)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    limited.wait_until(lambda: steps_in(workdir) >= 13, process)
    process.kill()
    _, log = process.communicate()
    assert process.returncode == -signal.SIGKILL and f"{KILLED}it is replaced" in log, log
    assert train.train(tiny.make_config(tiny_data), workdir) == 0
    assert "going on from step" in capsys.readouterr().err
    metrics = (workdir / "metrics.jsonl").read_bytes()
    assert metrics == (finished.workdir / "metrics.jsonl").read_bytes()
    ours, theirs = (
        jax.tree.leaves(restore_params(w / "checkpoints/20")) for w in (workdir, finished.workdir)
    )
    for own, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(own, other)


def test_interrupted_while_evaluating(finished, tiny_data, compiled, tmp_path, monkeypatch):
    workdir = copy_of(finished.workdir, tmp_path / "run")
    unfinish(workdir, 18)
    real, evaluated = validation.evaluate, []

    def evaluate(params, *arguments, **options):
        evaluated.append(jax.tree.map(np.asarray, params))
        os.kill(os.getpid(), signal.SIGINT)
        return real(params, *arguments, **options)

    config = tiny.make_config(tiny_data)
    with monkeypatch.context() as patch:
        patch.setattr(validation, "evaluate", evaluate)
        assert train.train(config, workdir) == 128 + signal.SIGINT
    assert [line["step"] for line in split_of(workdir, "validation")] == [8, 16]
    assert saved_steps(workdir)[-1] == STEPS
    average = restore_params(workdir / "checkpoints/20")  # what is evaluated, and chosen by
    jax.tree.map(np.testing.assert_array_equal, evaluated[0], average)
    assert ranks(workdir)[STEPS] is None
    last = epath.Path(workdir / "checkpoints/20")
    for _ in range(2):  # what it owes, and then no more than the rank, as after a kill before it
        assert train.train(config, workdir) == 0
        metrics = (workdir / "metrics.jsonl").read_bytes()
        assert metrics == (finished.workdir / "metrics.jsonl").read_bytes()
        assert ranks(workdir)[STEPS] == ranks(finished.workdir)[STEPS]
        assert checkpointer.find_fault(last) is None
        (last / "metrics/metrics").write_text("{}")
        checkpointer.write_checksums(last)


def ranks(workdir) -> dict[int, float | None]:
    """The metric that ranks checkpoints, of each that is left."""
    files = (workdir / "checkpoints").glob("*/metrics/metrics")
    return {int(path.parts[-3]): json.loads(path.read_text()).get("top1") for path in files}


def test_a_validation_without_a_finite_loss_ranks_nothing(tmp_path):
    """Neither a checkpoint nor the early stop; in the metrics it is null."""
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 4, "split": "validation", "top1_24": null}\n'
        '{"step": 8, "split": "validation", "top1_24": 0.5}\n'
    )
    setup = SimpleNamespace(
        config=tiny.make_config(tmp_path, train__early_stopping_epochs=1),
        workdir=epath.Path(tmp_path),
        schedule=SimpleNamespace(steps_per_epoch=4, evaluates_at=lambda step: False),
        data=SimpleNamespace(validation=None),
    )
    own = validation.Validation(setup, SimpleNamespace(), SimpleNamespace(), start=8)
    assert own.reason_to_stop() == ""


def test_other_views_in_validation_are_said(finished, tiny_data, tmp_path, capsys):
    workdir = copy_of(finished.workdir, tmp_path / "run")
    config = tiny.make_config(tiny_data, eval__settings=((12, 4, 42),), eval__clips=1)
    assert train.train(config, workdir) == 0
    assert (
        "warning: other eval.settings and eval.clips than before: validation numbers, and which "
        "checkpoint is the best, cannot be compared"
    ) in capsys.readouterr().err


def test_validation_that_cannot_be_read_is_refused_and_costs_no_step(
    finished, tiny_data, compiled, tmp_path, monkeypatch
):
    """Before training where it is known by then; after it the steps that were done are kept."""
    workdir, videos = copy_of(finished.workdir, tmp_path / "run"), tmp_path / "videos"
    unfinish(workdir, 18)
    shutil.copytree(tiny_data, videos)
    config = tiny.make_config(tiny_data, data__validation=str(videos / "validation.csv"))
    real = validation.evaluate

    def evaluate(*arguments, **options):
        shutil.move(videos, tmp_path / "away")
        return real(*arguments, **options)

    message = f"not one of 13 videos can be read; 16.mp4: .* looked for in {videos},"
    with monkeypatch.context() as patch:
        patch.setattr(validation, "evaluate", evaluate)
        with pytest.raises(UserError, match=message):
            train.train(config, workdir)
    assert saved_steps(workdir)[-1] == STEPS
    assert [line["step"] for line in split_of(workdir, "validation")] == [8, 16]
    videos.mkdir()
    shutil.copy(tmp_path / "away" / "validation.csv", videos)
    with pytest.raises(UserError, match=message):
        train.train(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    shutil.copytree(tmp_path / "away", videos, dirs_exist_ok=True)
    assert train.train(config, workdir) == 0  # what it owes
    metrics = (workdir / "metrics.jsonl").read_bytes()
    assert metrics == (finished.workdir / "metrics.jsonl").read_bytes()


def test_a_trace_of_the_steps_asked_for(finished, tiny_data, compiled, tmp_path):
    """It changes no metric; the field may change on resume."""
    workdir = copy_of(finished.workdir, tmp_path / "run")
    unfinish(workdir, 18)
    config = tiny.make_config(tiny_data, log__profile_steps="19,20")
    assert train.train(config, workdir) == 0
    metrics = (workdir / "metrics.jsonl").read_bytes()
    assert metrics == (finished.workdir / "metrics.jsonl").read_bytes()
    (trace,) = (workdir / "profile").rglob("*.xplane.pb")
    events = [
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert events == [19, 20]
    with pytest.raises(UserError, match=r"'9,8' is not the first and the last step"):
        tiny.make_config(tiny_data, log__profile_steps="9,8")


def test_a_second_signal_acts_at_once():
    with PreemptionHandler() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.should_stop() and preemption.status == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


# --- Bad clips, bad numbers


def test_bad_clips_are_listed_and_said_once_and_too_many_stop_the_run(
    finished, tiny_data, compiled, tmp_path, capsys
):
    head, *rows = (tiny_data / "train.csv").read_text().splitlines()
    bad_first = tmp_path / "bad_first.csv"  # so it is met in the third step
    bad_first.write_text("\n".join([head, f"{tiny.BAD},1", *rows]) + "\n")
    own = {"data__train": str(bad_first), "data__root": str(tiny_data), "data__validation": ""}
    config = tiny.make_config(tiny_data, data__max_bad_fraction=0.5, **own)
    assert train.train(config, tmp_path / "run") == 0
    (bad,) = tiny.read_lines(tmp_path / "run" / "bad_clips.jsonl")
    assert bad["id"] == tiny.BAD and bad["reason"]
    log = capsys.readouterr().err.splitlines()
    met = f"cannot read {tiny.BAD}, trains on another clip instead: {bad['reason']}"
    summary = f"1 training video could not be read: {tmp_path / 'run' / 'bad_clips.jsonl'}"
    assert log.count(met) == log.count(summary) == 1 and log.index(met) < log.index(summary)
    counts = [line["bad_clips"] for line in split_of(tmp_path / "run", "train")]
    assert bad["step"] > 1 and not any(counts[: bad["step"] - 1])  # none before it was met
    assert counts[bad["step"] - 1] == config.data.repeated_aug
    assert counts[-1] == config.data.repeated_aug * round(STEPS * 8 / 34)

    # Back to before it was met and to after it: the list does not grow.
    unfinish(tmp_path / "run", 18)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert train.train(config, tmp_path / "run") == 0
    assert tiny.read_lines(tmp_path / "run" / "bad_clips.jsonl") == [bad]
    log = capsys.readouterr().err.splitlines()
    assert met not in log and summary in log
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before

    unfinish(tmp_path / "run", 18)
    config.data.max_bad_fraction = 0.01
    with pytest.raises(UserError, match=r"of 152 training clips .*0.01; they are listed in .*run/"):
        train.train(config, tmp_path / "run")


def test_stopped_while_waiting_for_a_batch(finished, tiny_data, compiled, tmp_path, monkeypatch):
    """All workers are stopped, there is no time limit, and then comes the first signal."""
    workdir = copy_of(finished.workdir, tmp_path / "run")
    unfinish(workdir, 18)
    config = tiny.make_config(tiny_data, data__workers=1, data__clip_seconds=0.0)
    real = pipeline.Batches.next_unless

    def next_unless(batches, stop):
        if batches.state()["step"] == 19:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGSTOP)
            batches._arrived.clear()
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return real(batches, stop)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Batches, "next_unless", next_unless)
        assert train.train(config, workdir) == 128 + signal.SIGTERM
    assert saved_steps(workdir)[-1] == 19  # step 19 was done, and would not have been saved
    assert split_of(workdir, "train") == split_of(finished.workdir, "train")[:19]


def test_clips_to_skip_stay_listed_and_damaged_lines_do_not(tmp_path):
    clips = train.BadClips(tmp_path, 0)
    clips.quarantine["c: d.mp4"] = "hangs: not read within 60 s"
    clips.note(3, np.array(["b.mp4: cut off\nc: d.mp4: hangs: not read within 60 s"]))
    clips.write()
    clips.close()
    path = tmp_path / train.BAD_CLIPS
    with path.open("ab") as file:
        file.write(b'7\n{"step": 1}\n\xff\n{"step": "1", "id": "e", "reason": "f"}\n{"st')
    again = train.BadClips(tmp_path, 2)
    assert again.quarantine == {"c: d.mp4": "hangs: not read within 60 s"}
    (line,) = tiny.read_lines(path)
    assert line == {"step": 3, "id": "c: d.mp4", "reason": "hangs: not read within 60 s"} | {
        "skip": True
    }


@pytest.mark.slow
def test_a_run_that_waits_for_its_data_says_what_helps_once(
    tiny_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train, "ADVISED_AFTER", 0.0)
    monkeypatch.setattr(train, "ADVISED_ABOVE", -1.0)
    monkeypatch.setattr(train.wording.os, "cpu_count", lambda: 4)
    config = tiny.make_config(tiny_data, data__workers=0, data__validation="")
    assert train.train(config, tmp_path / "run") == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "spent waiting" in line]
    # The largest grids are of 42 px.
    assert line.endswith(
        "what helps: --config.data.workers=4 (now 0); smaller copies of the videos "
        f"(python -m fluxvit_jax.data.shrink --root={tiny_data} --out=SMALL --short_side=48) "
        "in a new workdir"
    )
    config.data.train = "gs://bucket/train.csv"  # which is not asked: this is no time to fail
    setup = SimpleNamespace(config=config, grids=())
    assert "fluxvit_jax.data.shrink writes" in train.wording.describe_waiting(setup, 0.6)


def test_many_bad_clips_are_not_all_said(tmp_path, capsys):
    clips = train.BadClips(tmp_path, 0)
    clips.note(1, np.array([f"{n}.mp4: cut off" for n in range(9)]))
    clips.write()
    log = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in log[:-1]] == [f"{n}.mp4," for n in range(5)]
    assert log[-1].endswith(f"only listed, in {tmp_path / train.BAD_CLIPS}")
    assert clips.summary.startswith("9 training videos could not be read: ")


def test_bad_clips_are_forgotten_past_the_step_of_resume(tmp_path):
    clips = train.BadClips(tmp_path, 0)
    clips.note(1, np.array(["", "a.mp4: cut off", "a.mp4: cut off"]))
    clips.note(3, np.array(["b.mp4: no video: none\na.mp4: cut off", ""]))
    clips.write()
    expected = [
        {"step": 1, "id": "a.mp4", "reason": "cut off"},
        {"step": 3, "id": "b.mp4", "reason": "no video: none"},
    ]
    assert tiny.read_lines(tmp_path / train.BAD_CLIPS) == expected
    again = train.BadClips(tmp_path, 2)
    assert tiny.read_lines(tmp_path / train.BAD_CLIPS) == expected[:1]
    again.note(3, np.array(["b.mp4: no video: none\na.mp4: cut off", ""]))
    again.write()
    assert tiny.read_lines(tmp_path / train.BAD_CLIPS) == expected


# --- Steps whose loss is not finite


def overflowing(config):
    """A state whose weights are far too large for a finite loss."""
    optimizer = make_optimizer(config, STEPS, abstract_params(config))
    state = initial_state(config, optimizer, make_mesh(config))
    return state | {"params": jax.tree.map(lambda x: x * 1e30, state["params"])}


@pytest.mark.slow
def test_steps_without_a_finite_loss_in_a_row_end_the_run(finished, tiny_data, compiled, tmp_path):
    """It goes on, with a lower rate, from a checkpoint that finite losses followed."""
    workdir = tmp_path / "run"
    config = tiny.make_config(tiny_data, train__max_nonfinite=3)
    with Checkpoints(finished.workdir, 9, 2) as stored:
        _, good, _ = stored.restore_latest(jax.eval_shape(lambda: overflowing(config)))
    with Checkpoints(workdir, 2, 2) as checkpoints:
        # Of the data, a run of an earlier version kept no more than how many videos there are.
        for step, state in [(14, good), (16, overflowing(config))]:
            saved = {"step": step, "videos": 16}
            checkpoints.save(step, state | {"step": jnp.int32(step)}, saved, config)
    message = (
        r"step 19: the loss is nan, as in 3 steps in a row \(config.train.max_nonfinite=3\); the "
        r"last good step was 16, whose checkpoint is now .*/16\.nonfinite; the same command with a "
        r"lower --config.optim.learning_rate goes on"
    )
    with pytest.raises(UserError, match=message):
        train.train(config, workdir)
    assert saved_steps(workdir) == [14]
    config = tiny.make_config(tiny_data, optim__learning_rate=config.optim.learning_rate / 2)
    assert train.train(config, workdir) == 0
    assert [line["skipped_steps"] for line in split_of(workdir, "train")] == [0] * 6


def test_a_checkpoint_among_steps_that_were_skipped_is_set_aside(tmp_path):
    """SIGTERM after three of them: what was saved then is no better than what was before."""
    with Checkpoints(tmp_path, 9, 1) as checkpoints:
        for step in (90, 103):
            checkpoints.save(step, {"params": {"a": jnp.ones(2)}}, {}, {})
        steps = nonfinite.NonfiniteSteps(4, {nonfinite.SAVED: [3, 3]}, checkpoints)
        scalars = {"skipped": True, "loss": math.nan, "gradient_norm": 1.0, "update_norm": 1.0}
        with pytest.raises(UserError, match=r"good step was 100, whose .* is now .*103\.nonfinite"):
            steps.note(104, scalars)
    assert saved_steps(tmp_path) == [90]


def test_a_step_without_a_finite_gradient_is_skipped(
    tiny_data, compiled, tmp_path, monkeypatch, capsys
):
    """Also in a run resumed after it; the schedule goes by the steps that were not skipped."""
    own = {"data__validation": "", "train__epochs": 2, "train__budgets": (24,)}
    config = tiny.make_config(tiny_data, **own)
    workdir, real = tmp_path / "run", steps.accumulate
    key = jax.random.fold_in(jax.random.key(config.seed), 4)  # of step 5
    bad = jax.random.key_data(jax.random.split(key, 8)[0])

    def accumulate(objective, params, frozen, batch, *sizes):
        gradients, terms = real(objective, params, frozen, batch, *sizes)
        now = jnp.all(jax.random.key_data(batch["key"][0]) == bad)
        return jax.tree.map(lambda x: jnp.where(now, jnp.nan, x), gradients), terms

    monkeypatch.setattr(steps, "accumulate", accumulate)
    assert train.train(config, workdir) == 0
    said = "step 5: the gradient norm is nan; the step is skipped and changes nothing (1 in a row,"
    assert capsys.readouterr().err.count(said) == 1
    lines = split_of(workdir, "train")
    assert [line["skipped_steps"] for line in lines] == [0] * 4 + [1] * 4
    assert lines[4]["param_norm"] == lines[3]["param_norm"] != lines[5]["param_norm"]
    rates = [line["learning_rate"] for line in lines]
    assert rates[5:] == list(learning_rates(config, 8)[4:-1])
    metrics = (workdir / "metrics.jsonl").read_bytes()
    unfinish(workdir, 6)
    assert train.train(config, workdir) == 0
    assert (workdir / "metrics.jsonl").read_bytes() == metrics


def test_a_skipped_step_keeps_every_bit_of_the_state(tiny_data, compiled):
    config = tiny.make_config(tiny_data)
    grids = admissible_grids(config)
    call, _, _ = make_step(config)
    state = overflowing(config)
    before = jax.tree.map(np.array, state)
    after, scalars = call(state, grid_batch([grids[i] for i in (0, 19, 17, 5)], capacity(grids)))
    assert scalars["skipped"] and not np.isfinite(scalars["loss"])
    assert after["step"] == before["step"] + 1
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, after[name], before[name])


# --- The data of a run


def rewritten(tiny_data, tmp_path, change) -> dict:
    """Fields of a config whose training list has lines changed by `change`."""
    header, *rows = (tiny_data / "train.csv").read_text().splitlines()
    (tmp_path / "list.csv").write_text("\n".join([header, *change(rows)]) + "\n")
    return {"data__train": str(tmp_path / "list.csv"), "data__root": str(tiny_data)}


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda rows: [row.replace(",0", ",1") for row in rows], "other labels for the same"),
        (lambda rows: [*rows[:-1], "20.mp4,0"], "other videos, or the same in another order"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "the same in another order"),
        (lambda rows: rows[:-1], "15 videos instead of 16"),
    ],
    ids=["labels", "videos", "order", "number"],
)
def test_a_run_goes_on_with_other_data_only_if_told_to(
    finished, tiny_data, tmp_path, capsys, change, difference
):
    workdir = copy_of(finished.workdir, tmp_path / "run")
    config = tiny.make_config(tiny_data, **rewritten(tiny_data, tmp_path, change))
    with pytest.raises(UserError, match=f"was begun with other data: .*{difference}.*"):
        train.train(config, workdir)
    assert train.train(config, workdir, accept_data_change=True) == 0
    assert "warning: going on with other data" in capsys.readouterr().err


@pytest.mark.slow
def test_other_steps_an_epoch_change_the_schedule(finished, tiny_data, tmp_path, capsys):
    """Half of the videos, and a run that is past the end of what would have been its steps."""
    workdir = copy_of(finished.workdir, tmp_path / "run")
    unfinish(workdir, 18)
    data = rewritten(tiny_data, tmp_path, lambda rows: rows[:8])
    config = tiny.make_config(tiny_data, train__epochs=12, **data)
    assert train.train(config, workdir, accept_data_change=True) == 0
    rates = learning_rates(tiny.make_config(tiny_data), STEPS)
    assert (
        "12 epochs in place of 5: the learning rate goes on along the new schedule: "
        f"{rates[17]:.3g} before"
    ) in capsys.readouterr().err


@pytest.mark.slow
def test_lost_checkpoints_are_said_and_the_log_stays(finished, tiny_data, tmp_path, capsys):
    workdir = copy_of(finished.workdir, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    before = (workdir / "metrics.jsonl").read_bytes()
    config = tiny.make_config(tiny_data, train__epochs=1)
    with pytest.raises(UserError, match=r"its checkpoints are gone: .*/run/checkpoints has"):
        train.train(tiny.make_config(tiny_data), workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert train.train(config, workdir, fresh=True) == 0
    assert "the files of the earlier run are in" in capsys.readouterr().err
    assert (workdir / "earlier-1/metrics.jsonl").read_bytes() == before
    assert tiny.read_lines(workdir / "metrics.jsonl")[0]["step"] == 1
    assert json.loads((workdir / "config.json").read_text())["train"]["epochs"] == 1


def test_a_run_goes_on_with_moved_data(finished, tiny_data, tmp_path):
    """The same list and videos elsewhere; the config of the workdir follows."""
    workdir = copy_of(finished.workdir, tmp_path / "run")
    unfinish(workdir, 18)
    moved = shutil.copytree(tiny_data, tmp_path / "moved")
    assert train.train(tiny.make_config(moved), workdir) == 0
    metrics = (workdir / "metrics.jsonl").read_bytes()
    assert metrics == (finished.workdir / "metrics.jsonl").read_bytes()
    assert json.loads((workdir / "config.json").read_text())["data"]["train"] == str(
        moved / "train.csv"
    )


@pytest.mark.slow
def test_names_of_classes_stay_with_the_weights(tiny_data, compiled, tmp_path):
    """They come from the class folders, which may be gone or another's when weights are used."""
    folders = {
        "data__train": tiny.class_folders(tiny_data, tmp_path / "t", "abcd", range(16)),
        "data__validation": tiny.class_folders(tiny_data, tmp_path / "v", "abcd", range(16, 28)),
        "train__epochs": 1,
        "model__classes": 0,
    }
    workdir = tmp_path / "run"
    config = tiny.make_config(tiny_data, **folders)
    assert train.train(config, workdir) == 0
    assert (workdir / "classes.txt").read_text() == "a\nb\nc\nd\n"
    assert json.loads((workdir / "config.json").read_text())["model"]["classes"] == 4
    named = tmp_path / "named.csv"  # of two classes, which the checkpoint knows
    named.write_text("16.mp4,A\n17.mp4,b\n")
    lists = {"data__validation": str(named), "data__root": str(tiny_data)}
    assert tasks.run(tiny.make_config(tiny_data, model__classes=0, **lists), str(workdir)) == 0
    assert [row["label"] for row in tiny.read_evaluation(workdir)[1]] == [0, 1]
    (tmp_path / "t").rename(tmp_path / "elsewhere")
    tiny.class_folders(tiny_data, tmp_path / "t", "wxyz", range(16))
    assert from_pretrained(workdir).config.class_names == tuple("abcd")
    assert from_pretrained(workdir / "checkpoints" / "4").config.class_names == tuple("abcd")
    with pytest.raises(UserError, match=r"class 0 is 'a', but .* 'w'"):  # validation says a
        train.train(config, workdir)
    with pytest.raises(UserError, match="begun with other data: other videos"):
        train.train(tiny.make_config(tiny_data, **folders | {"data__validation": ""}), workdir)


def test_validation_classes_of_other_names_are_refused(tiny_data, tmp_path):
    """As many classes as in training; sorted first, one of them shifts all labels."""
    folders = {
        "data__train": tiny.class_folders(tiny_data, tmp_path / "t", "bcde", range(16)),
        "data__validation": tiny.class_folders(tiny_data, tmp_path / "v", "bcda", range(16, 28)),
    }
    with pytest.raises(UserError, match=r"validation=.*: class 0 is 'a', but .*train=.* 'b'"):
        train.train(tiny.make_config(tiny_data, **folders), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_shared_videos_are_said(tiny_data, compiled, tmp_path, capsys):
    config = tiny.make_config(
        tiny_data, train__epochs=1, data__validation=str(tiny_data / "train.csv")
    )
    assert train.train(config, tmp_path / "run") == 0
    assert "warning: 16 of 16 videos of config.data.validation are also in" in (
        capsys.readouterr().err
    )


# --- The step


def grid_batch(grids: list[Grid], P: int, group: int = 2, seed: int = 0) -> dict:
    """A batch of noise with a group of clips on each of `grids`."""
    rng = np.random.default_rng(seed)
    B = len(grids) * group
    patches = rng.integers(0, 256, (B, P, 588)).astype(np.uint8)
    for row, grid in enumerate(np.repeat(np.array(grids), group, axis=0)):
        patches[row, grid.prod() :] = 0
    return {
        "patches": patches,
        "grid": np.repeat(np.array(grids, np.int32), group, axis=0),
        "label": rng.integers(0, tiny.CLASSES, B).astype(np.int32),
        "failure": np.array([""] * B),
    }


def make_step(config):
    """The compiled step and the state it starts from."""
    mesh = make_mesh(config)
    optimizer = make_optimizer(config, STEPS, abstract_params(config))
    objective = steps.make_objective(config, admissible_grids(config), "cpu")
    state = initial_state(config, optimizer, mesh)
    step = steps.make_train_step(config, objective, optimizer, mesh)
    return lambda state, b: step(state, {}, shard_batch(steps.device_batch(b), mesh)), state, step


def test_one_compiled_step_for_all_grids(tiny_data, compiled):
    config = tiny.make_config(
        tiny_data,
        data__grids__frames="2..21..1",
        data__grids__tokens=(8, 189),
        train__budgets=(24,),
    )
    grids = list(admissible_grids(config))
    assert len(grids) >= 40
    _, state, step = make_step(config)
    mesh = make_mesh(config)
    shapes = steps.abstract_batch(config, tuple(grids), mesh)
    compiled_step = step.lower(state, {}, shapes).compile()

    def call(chosen, P):
        batch = steps.device_batch(grid_batch(chosen, P))
        return compiled_step(state, {}, shard_batch(batch, mesh))

    for first in range(0, len(grids), 4):
        state, measured = call(grids[first : first + 4], capacity(grids))
        assert np.isfinite(measured["loss"])
    with pytest.raises(TypeError, match="uint8"):  # nothing is compiled for another length
        call(grids[:4], capacity(grids) + 1)


def test_the_average_and_the_norms_are_of_the_new_parameters(tiny_data, compiled):
    config = tiny.make_config(tiny_data)
    assert config.train.ema_decay == 0.8
    grids = admissible_grids(config)
    batch = grid_batch([grids[i] for i in (0, 19, 17, 5)], capacity(grids))
    call, state, _ = make_step(config)
    for _ in range(4):  # the first ones hardly move, at the start of the warm-up
        average, old = (jax.tree.map(np.array, state[name]) for name in ("ema", "params"))
        state, scalars = call(state, batch)
        expected = jax.tree.map(lambda a, new: 0.8 * a + 0.2 * new, average, state["params"])
        for found, own in zip(*map(jax.tree.leaves, (state["ema"], expected)), strict=True):
            np.testing.assert_allclose(found, own, rtol=1e-5, atol=1e-7)
    updates = jax.tree.map(lambda a, b: b - a, old, state["params"])
    moved = [np.abs(update).max() for update in jax.tree.leaves(updates)]
    assert np.median(moved) > 1e-4  # much more than the tolerance
    for name, tree in (("param_norm", state["params"]), ("update_norm", updates)):
        norm = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree)))
        assert scalars[name].dtype == np.float32
        np.testing.assert_allclose(scalars[name], norm, rtol=1e-4, err_msg=name)


def quiet_config(tiny_data, **changes):
    """The recipe without anything that draws random numbers in a step."""
    off = dict.fromkeys(
        ("train__mixup", "train__cutmix", "train__random_erasing", "model__drop_path"), 0.0
    )
    return tiny.make_config(tiny_data, **off | changes)


@pytest.mark.slow
@pytest.mark.parametrize("drawn", ["", "train__random_erasing", "model__drop_path"])
def test_each_step_draws_anew(tiny_data, compiled, drawn):
    """From equal parameters, by the number of the step; with all of it off nothing is drawn."""
    changes = {"train__budgets": (24,)} | ({drawn: 0.5} if drawn else {})
    config = quiet_config(tiny_data, train__mixup_probability=1.0, **changes)
    grids = admissible_grids(config)
    batch = grid_batch([grids[i] for i in (0, 19, 17, 5)], capacity(grids))
    call, state, _ = make_step(config)
    numbered = [state | {"step": jnp.int32(step)} for step in (3, 4, 3)]
    copies = [jax.tree.map(jnp.copy, own) for own in numbered]
    first, other, again = (float(call(own, batch)[1]["loss"]) for own in copies)
    assert first == again
    assert (abs(first - other) > 1e-6 * first) == bool(drawn)


@pytest.mark.slow
def test_each_clip_draws_for_itself(tiny_data, compiled):
    """Exchanging two clips changes nothing but what each of them draws."""
    changes = {"data__clips_per_grid": 1, "data__repeated_aug": 1, "train__budgets": (24,)}

    def losses(**more) -> list[float]:
        config = quiet_config(tiny_data, **changes, **more)
        batch = grid_batch([Grid(6, 3, 3)], capacity(admissible_grids(config)), group=8)
        swapped = {name: x[[1, 0, *range(2, 8)]] for name, x in batch.items()}
        call, state, _ = make_step(config)
        return [
            float(call(jax.tree.map(jnp.copy, state), own)[1]["loss"]) for own in (batch, swapped)
        ]

    np.testing.assert_allclose(*losses(), rtol=1e-6)
    before, after = losses(train__random_erasing=1.0)
    assert abs(before - after) > 1e-5 * before


def test_accumulated_gradients_are_those_of_the_whole_batch(tiny_data):
    """With all that is random, since that goes with the clips."""
    config = tiny.make_config(tiny_data, train__random_erasing=0.25, train__budgets=(24,))
    assert config.train.mixup and config.model.drop_path
    grids = admissible_grids(config)
    objective = steps.make_objective(config, grids, "cpu")
    params = fluxvit.init_params(model_config(config), jax.random.key(1))
    batch = grid_batch([grids[i] for i in (0, 19, 17, 5)], capacity(grids))
    del batch["failure"]
    batch["key"] = jax.random.split(jax.random.key(0), 8)

    def gradients(parts: int):
        def compute(batch):
            return steps.accumulate(objective, params, {}, batch, config.data.clips_per_grid, parts)

        return jax.jit(compute)(batch)

    (whole, measured), (parts, of_parts) = gradients(1), gradients(4)
    for name in measured:
        np.testing.assert_allclose(of_parts[name], measured[name], rtol=1e-5, err_msg=name)
    for own, other in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert np.linalg.norm(own - other) <= 1e-5 * np.linalg.norm(other) + 1e-7


def test_a_batch_that_devices_cannot_share_is_refused(tiny_data):
    config = tiny.make_config(tiny_data, train__grad_accum_steps=2)
    setup.check_batch_size(config, 2)
    with pytest.raises(UserError, match=r"8 clips .* 3 devices .* the nearest that does is 12"):
        setup.check_batch_size(config, 3)
    with pytest.raises(UserError, match=r"40 clips are more than an epoch of .* has, 32"):
        setup.run_length(tiny.make_config(tiny_data, train__batch_size=40), 16)


# --- Weights to start from


def start_from(source, class_names=None, **changes):
    """The parameters that a run starts with, and what is said of them."""
    config = tiny.make_config(source[1], **changes)
    model = model_config(config)
    fresh = fluxvit.init_params(model, jax.random.key(0))
    loaded = init_from.load(str(source[0]), model)
    params, notes = init_from.fit(loaded, model, fresh, "SOURCE", class_names)
    check_fit(params, fresh, "SOURCE")
    return params, notes, fresh, loaded.params


def test_weights_of_a_workdir_start_another_run(finished, tiny_data):
    params, notes, *_ = start_from((finished.workdir, tiny_data))
    assert notes == []
    jax.tree.map(np.testing.assert_array_equal, params, restore_params(finished.workdir))


def test_another_number_of_classes_starts_afresh_and_is_said(finished, tiny_data):
    params, notes, fresh, loaded = start_from((finished.workdir, tiny_data), model__classes=7)
    assert notes == ["SOURCE: its classifier is for 4 classes; a new one for 7 starts afresh"]
    np.testing.assert_array_equal(params["heads"]["kernel"], fresh["heads"]["kernel"])
    np.testing.assert_array_equal(params["cls_token"], loaded["cls_token"])


def test_a_classifier_of_other_class_names_starts_afresh(finished, tiny_data, tmp_path):
    named = read_weights(finished.workdir, {"id2label": dict(zip("0123", "abcd", strict=True))})
    weight_files.write(named, tmp_path / "named")
    source = (tmp_path / "named", tiny_data)
    for unchanged in (None, ("a", "b", "c", "d")):
        params, notes, _, loaded = start_from(source, unchanged)
        assert notes == []
        np.testing.assert_array_equal(params["heads"]["kernel"], loaded["heads"]["kernel"])
    params, (note,), fresh, loaded = start_from(source, ("b", "a", "c", "d"))
    assert "its classifier is for other classes" in note and "class 0 is 'a'" in note
    np.testing.assert_array_equal(params["heads"]["kernel"], fresh["heads"]["kernel"])
    np.testing.assert_array_equal(params["cls_token"], loaded["cls_token"])


@pytest.mark.parametrize("before", [(), class_names.of_dataset("k710")])
def test_a_classifier_of_kinetics_710_is_cut_by_the_official_table(finished, tiny_data, before):
    loaded = init_from.load(str(finished.workdir), model_config(tiny.make_config(tiny_data)))
    heads = {
        "kernel": np.zeros((*loaded.params["heads"]["kernel"].shape[:2], 710), np.float32),
        "bias": np.tile(np.arange(710, dtype=np.float32), (3, 1)),
    }
    loaded = loaded._replace(params=loaded.params | {"heads": heads}, class_names=before)

    def start(names, classes):
        model = model_config(tiny.make_config(tiny_data, model__classes=classes))
        fresh = fluxvit.init_params(model, jax.random.key(0))
        params, (note,) = init_from.fit(loaded, model, fresh, "SOURCE", names)
        check_fit(params, fresh, "SOURCE")
        return params["heads"]["bias"], note

    bias, note = start(class_names.of_dataset("k600"), 600)
    assert note.endswith("for Kinetics-710 is cut to the 600 classes of Kinetics-600")
    np.testing.assert_array_equal(bias, np.tile(class_names.labels_in_k710("k600"), (3, 1)))
    for names in (None, tuple(f"own {i}" for i in range(600))):
        bias, note = start(names, 600)
        assert note.endswith("for 710 classes; a new one for 600 starts afresh")
        assert not bias.any()


def test_another_gelu_is_said(finished, tiny_data):
    params, notes, *_ = start_from((finished.workdir, tiny_data), model__gelu="erf")
    assert notes == ["SOURCE: trained with model.gelu=tanh; goes on with erf"]
    jax.tree.map(np.testing.assert_array_equal, params, restore_params(finished.workdir))


def test_another_native_grid_resizes_the_positions(finished, tiny_data):
    params, notes, _, loaded = start_from(
        (finished.workdir, tiny_data), model__frames=16, model__resolution=28
    )
    (note,) = notes
    assert note.endswith(" from 8 frames x 56 x 56 px to 16 frames x 28 x 28 px")
    expected = resize_positions(loaded["pos_embed"], Grid(8, 4, 4), Grid(16, 2, 2))
    np.testing.assert_array_equal(params["pos_embed"], expected)


def test_official_safetensors(finished, tiny_data, tmp_path):
    params = restore_params(finished.workdir)
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(official_names.to_official(params), path)
    read, notes, *_ = start_from((path, tiny_data))
    assert notes == []
    jax.tree.map(np.testing.assert_array_equal, read, params)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.safetensors", None, "no such file"),
        ("missing", None, "no such file or folder"),
        ("broken.safetensors", b"\x08\0\0\0\0\0\0\0nothing!", "cannot be read as .safetensors"),
        ("weights.pth", b"PK", "it is no zip archive"),
        ("weights.ckpt", b"", "is neither .pth"),
    ],
)
def test_weights_that_cannot_be_read(tmp_path, tiny_data, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        init_from.load(str(tmp_path / name), model_config(tiny.make_config(tiny_data)))
