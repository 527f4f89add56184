"""Whole runs on real files: they learn, and neither kills nor devices nor bad files change them."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fluxvit_jax import optim, parallel, train, weights
from fluxvit_jax import step as steps
from fluxvit_jax.budgets import Grid, capacity
from fluxvit_jax.checkpoint import Checkpoints, check_fit, restore_params
from fluxvit_jax.config import admissible_grids, model_config
from fluxvit_jax.convert import names
from fluxvit_jax.convert.adapt import resize_positions
from fluxvit_jax.devices import device_name
from fluxvit_jax.errors import UserError
from fluxvit_jax.interruption import Interruption
from fluxvit_jax.models import fluxvit
from fluxvit_jax.state import abstract_params, initial_state
from tests import tiny

STEPS = 20


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


def test_what_a_run_leaves(finished, tiny_data):
    workdir = finished.workdir
    assert {p.name for p in workdir.iterdir()} >= {
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "tensorboard",
    }
    assert "1 compiled training step for 40 grids, capacity P=189" in finished.log
    assert f"training on 1 x {device_name()}" in finished.log
    average, last = restore_params(workdir), restore_params(workdir, average=False)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (average, last)), strict=True))
    assert {18, 20} <= set(saved_steps(workdir))  # the latest two, and the best


def test_a_finished_run_says_so(finished, tiny_data, capsys):
    assert train.train(tiny.make_config(tiny_data), finished.workdir) == 0
    assert "is finished: all 20 steps are done" in capsys.readouterr().err


def test_another_config_is_refused(finished, tiny_data):
    config = tiny.make_config(tiny_data, train__epochs=6, log__every_steps=3)
    with pytest.raises(UserError, match=r"another config \(train.epochs: 5 -> 6\)"):
        train.train(config, finished.workdir)


# --- Stopping and going on


@pytest.mark.slow
def test_killed_and_resumed_is_as_undisturbed(finished, tiny_data, compiled, tmp_path):
    """Three kills anywhere, then SIGTERM; two workers, where the undisturbed run has none."""
    workdir = tmp_path / "run"
    ends = sorted(random.sample(range(1, STEPS - 3), 3))
    print("killed at", ends)
    for end, number in [*((end, signal.SIGKILL) for end in ends), (STEPS - 2, signal.SIGTERM)]:
        process = tiny.start(tiny_data, workdir, compiled, "--config.data.workers=2")
        while steps_in(workdir) < end and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        _, log = process.communicate()
        if number == signal.SIGTERM:
            assert process.returncode == 128 + number, log
            assert f"stopped at step {saved_steps(workdir)[-1]}; the same command goes on" in log
            assert saved_steps(workdir)[-1] == steps_in(workdir) < STEPS
        else:
            assert process.returncode == -number, log
    process = tiny.start(tiny_data, workdir, compiled, "--config.data.workers=2")
    _, log = process.communicate()
    assert process.returncode == 0, log
    assert "going on from step" in log
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
    real = train.evaluate

    def evaluate(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    config = tiny.make_config(tiny_data)
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", evaluate)
        assert train.train(config, workdir) == 128 + signal.SIGINT
    assert [line["step"] for line in split_of(workdir, "validation")] == [8, 16]
    assert saved_steps(workdir)[-1] == STEPS
    for _ in range(2):  # what it owes, and then nothing
        assert train.train(config, workdir) == 0
        metrics = (workdir / "metrics.jsonl").read_bytes()
        assert metrics == (finished.workdir / "metrics.jsonl").read_bytes()


def test_a_second_signal_acts_at_once():
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.happened() and interruption.status == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_other_data_is_refused_on_resume(finished, tiny_data, compiled, tmp_path):
    workdir = copy_of(finished.workdir, tmp_path / "run")
    unfinish(workdir, 18)
    data = shutil.copytree(tiny_data, tmp_path / "data")
    (data / "train.csv").write_text((data / "train.csv").read_text() + "3.mp4,1\n")
    config = tiny.make_config(tiny_data)
    text = json.dumps(config.to_dict()).replace(str(tiny_data), str(data))
    (workdir / "config.json").write_text(text)
    with pytest.raises(UserError, match="begun with 16 videos to train on, now there are 17"):
        train.train(tiny.make_config(data), workdir)


# --- Bad clips, bad numbers


def test_bad_clips_are_listed_once_and_too_many_stop_the_run(
    finished, tiny_data, compiled, tmp_path
):
    config = tiny.make_config(tiny_data, data__train=f"{tiny_data}/train_bad.csv")
    config.data.max_bad_fraction = 0.5
    assert train.train(config, tmp_path / "run") == 0
    (bad,) = tiny.read_lines(tmp_path / "run" / "bad_clips.jsonl")
    assert bad["id"] == tiny.BAD and bad["reason"]
    counts = [line["bad_clips"] for line in split_of(tmp_path / "run", "train")]
    assert counts[bad["step"] - 2] == 0 if bad["step"] > 1 else True
    assert counts[bad["step"] - 1] == config.data.repeats
    assert counts[-1] == config.data.repeats * round(STEPS * 8 / 34)

    # Back to before it was met and to after it: the list does not grow.
    unfinish(tmp_path / "run", 18)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert train.train(config, tmp_path / "run") == 0
    assert tiny.read_lines(tmp_path / "run" / "bad_clips.jsonl") == [bad]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before

    unfinish(tmp_path / "run", 18)
    config.data.max_bad_fraction = 0.01
    with pytest.raises(UserError, match=r"of 152 training clips .*0.01; they are listed in .*run/"):
        train.train(config, tmp_path / "run")


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


def test_a_loss_that_is_no_number_stops_the_run(finished, tiny_data, compiled, tmp_path):
    """The run goes on from weights that are far too large."""
    config, workdir = tiny.make_config(tiny_data), tmp_path / "run"
    optimizer = optim.make_optimizer(config, STEPS, abstract_params(config))
    state = initial_state(config, optimizer, parallel.make_mesh(config))
    state["params"] = jax.tree.map(lambda x: x * 1e30, state["params"])
    with Checkpoints(workdir, 2, 2) as checkpoints:
        checkpoints.save(16, state | {"step": jnp.int32(16)}, {"step": 16, "videos": 16}, config)
    with pytest.raises(UserError, match="step 17: the loss is nan; the checkpoints from before"):
        train.train(config, workdir)
    assert saved_steps(workdir) == [16]


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
    mesh = parallel.make_mesh(config)
    optimizer = optim.make_optimizer(config, STEPS, abstract_params(config))
    objective = steps.make_objective(config, admissible_grids(config), "cpu")
    state = initial_state(config, optimizer, mesh)
    step = steps.make_train_step(config, objective, optimizer, mesh)
    return lambda state, b: step(state, {}, parallel.put(steps.device_batch(b), mesh)), state, step


def test_one_compiled_step_for_all_grids(tiny_data, compiled):
    config = tiny.make_config(tiny_data)
    grids = list(admissible_grids(config))
    assert len(grids) >= 40
    call, state, step = make_step(config)
    for first in range(0, len(grids), 4):
        state, measured = call(state, grid_batch(grids[first : first + 4], capacity(grids)))
        assert np.isfinite(measured["loss"])
    assert step._cache_size() == 1
    train.check_compilations(step, config, tuple(grids), announce=False)
    config.train.compiled_steps = 0
    with pytest.raises(RuntimeError, match=r"1 compiled training step where .* is 0"):
        train.check_compilations(step, config, tuple(grids), announce=False)


def test_accumulated_gradients_are_those_of_the_whole_batch(tiny_data):
    """With all that is random, since that goes with the clips."""
    config = tiny.make_config(tiny_data)
    assert config.train.mixup and config.train.erase and config.model.drop_path
    grids = admissible_grids(config)
    objective = steps.make_objective(config, grids, "cpu")
    params = fluxvit.initialise(model_config(config), jax.random.key(1))
    batch = grid_batch([grids[i] for i in (0, 39, 17, 5)], capacity(grids))
    del batch["failure"]
    batch["key"] = jax.random.split(jax.random.key(0), 8)

    def gradients(parts: int):
        def compute(batch):
            return steps.accumulate(objective, params, {}, batch, config.data.grid_group, parts)

        return jax.jit(compute)(batch)

    (whole, measured), (parts, of_parts) = gradients(1), gradients(4)
    for name in measured:
        np.testing.assert_allclose(of_parts[name], measured[name], rtol=1e-5, err_msg=name)
    for own, other in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert np.linalg.norm(own - other) <= 1e-5 * np.linalg.norm(other) + 1e-7


def test_devices_change_nothing(tiny_data, compiled):
    """One step and its numbers on one device and on four."""
    program = textwrap.dedent(
        f"""
        import json
        import jax
        from pathlib import Path
        from fluxvit_jax.budgets import capacity
        from fluxvit_jax.config import admissible_grids
        from tests import tiny
        from tests.test_train import grid_batch, make_step

        config = tiny.make_config(Path({str(tiny_data)!r}))
        grids = admissible_grids(config)
        batch = grid_batch([grids[i] for i in (0, 39, 17, 5)], capacity(grids))
        call, state, _ = make_step(config)
        numbers = [jax.device_count()]
        for _ in range(2):
            state, measured = call(state, batch)
            numbers += [float(measured["loss"]), float(measured["gradient_norm"])]
        print(json.dumps(numbers))
        """
    )
    numbers = []
    for devices in (1, 4):
        environment = tiny.environment(compiled, devices)
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        count, *rest = json.loads(done.stdout)
        assert count == devices
        numbers.append(rest)
    np.testing.assert_allclose(*numbers, rtol=1e-5)


def test_a_batch_that_devices_cannot_share_is_refused(tiny_data):
    config = tiny.make_config(tiny_data, train__accumulate=2)
    train.check_batch_size(config, 2)
    with pytest.raises(UserError, match=r"8 clips .* 3 devices .* the nearest that does is 12"):
        train.check_batch_size(config, 3)
    with pytest.raises(UserError, match=r"40 clips are more than an epoch of .* has, 32"):
        train.run_length(tiny.make_config(tiny_data, train__batch_size=40), 16)


# --- Weights to start from


def start_from(source, **changes):
    """The parameters that a run starts with, and what is said of them."""
    config = tiny.make_config(source[1], **changes)
    model = model_config(config)
    fresh = fluxvit.initialise(model, jax.random.key(0))
    loaded, grid = weights.load(str(source[0]), model)
    params, notes = weights.fit(loaded, grid, model, fresh, "SOURCE")
    check_fit(params, fresh, "SOURCE")
    return params, notes, fresh, loaded


def test_weights_of_a_workdir_start_another_run(finished, tiny_data):
    params, notes, *_ = start_from((finished.workdir, tiny_data))
    assert notes == []
    jax.tree.map(np.testing.assert_array_equal, params, restore_params(finished.workdir))


def test_another_number_of_classes_starts_afresh_and_is_said(finished, tiny_data):
    params, notes, fresh, loaded = start_from((finished.workdir, tiny_data), model__classes=7)
    assert notes == ["SOURCE: its classifier is for 4 classes; a new one for 7 starts afresh"]
    np.testing.assert_array_equal(params["heads"]["kernel"], fresh["heads"]["kernel"])
    np.testing.assert_array_equal(params["cls_token"], loaded["cls_token"])


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
    safetensors.numpy.save_file(names.to_official(params), path)
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
        weights.load(str(tmp_path / name), model_config(tiny.make_config(tiny_data)))
