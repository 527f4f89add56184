"""metrics.jsonl, TensorBoard files and the progress line."""

import io
import re
import sys
import time
from pathlib import Path

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from fluxvit_jax.config.fields import default_config
from fluxvit_jax.errors import UserError
from fluxvit_jax.training import metrics
from fluxvit_jax.training.metrics import Metrics, Progress
from fluxvit_jax.training.wandb_run import check_wandb
from tests import limited, tiny


def events(folder) -> list[Event]:
    """Every event of the TensorBoard files: records of length, crc, payload, crc."""
    found = []
    for path in sorted(folder.glob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += size + 16
    return found


def test_a_json_object_a_line(tmp_path):
    metrics = Metrics(tmp_path / "run")
    metrics.write(np.int64(10), "train", {"loss": jnp.float32(0.1), "clips": 64}, {"clips_s": 9.5})
    metrics.write(10, "validation", {"top1": float("nan"), "loss": np.float32(np.inf)})
    # Flushed, not closed.
    assert tiny.read_lines(tmp_path / "run/metrics.jsonl") == [
        {"step": 10, "split": "train", "loss": float(np.float32(0.1)), "clips": 64},
        {"step": 10, "split": "validation", "top1": None, "loss": None},
    ]
    metrics.close()
    values = {
        value.tag: value.simple_value
        for event in events(tmp_path / "run/tensorboard")
        for value in event.summary.value
    }
    assert values["train/clips_s"] == 9.5
    assert values["train/clips"] == 64
    assert np.isnan(values["validation/top1"])


def test_the_config_as_text_and_pictures(tmp_path):
    picture = np.full((20, 30, 3), (200, 30, 10), np.uint8)
    metrics = Metrics(tmp_path, default_config("Ti"))
    metrics.write_pictures(7, "validation", {"kept_24": picture})
    metrics.close()
    found = {
        value.tag: (event.step, value)
        for event in events(tmp_path / "tensorboard")
        for value in event.summary.value
    }
    _, config = found["config/text_summary"]
    assert "    optim.learning_rate = 0.0008\n" in config.tensor.string_val[0].decode()
    step, value = found["validation/kept_24"]
    shown = cv2.imdecode(np.frombuffer(value.image.encoded_image_string, np.uint8), 1)
    assert step == 7 and (value.image.height, value.image.width) == (20, 30)
    assert np.abs(shown[..., ::-1].astype(int) - picture).max() < 12
    assert not (tmp_path / "metrics.jsonl").read_text()  # numbers only


def test_wandb_that_is_not_installed_is_one_line(monkeypatch):
    config = default_config("Ti")
    check_wandb(config)
    config.log.wandb = "project"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"log.wandb=project: wandb is not installed; pip install"):
        check_wandb(config)


def test_wandb_offline_goes_on_under_its_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = default_config("Ti")
    config.log.wandb = "project"
    for start in (0, 2):
        metrics = Metrics(tmp_path, config)
        metrics.rewind(start)
        metrics.write(start + 1, "train", {"loss": 0.5})
        picture = np.zeros((20, 30, 3), np.uint8)
        metrics.write_pictures(start + 1, "validation", {"kept_24": picture})
        metrics.close()
        time.sleep(1)  # its folders are named by the second
    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(run.name.endswith(run_id) for run in runs)
    assert all(len(list(run.rglob("kept_24*.png"))) == 1 for run in runs)


def test_a_resumed_run_leaves_the_undisturbed_file(tmp_path):
    def run(workdir, start, stop):
        metrics = Metrics(workdir)
        metrics.rewind(start)
        for step in range(start + 1, stop + 1):
            metrics.write(step, "train", {"loss": 1 / step})
        metrics.close()

    run(tmp_path / "whole", 0, 9)
    run(tmp_path / "cut", 0, 7)
    file = tmp_path / "cut/metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-5])  # killed inside a line
    run(tmp_path / "cut", 4, 9)
    assert file.read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    starts = [
        event.step for event in events(tmp_path / "cut/tensorboard") if event.session_log.status
    ]
    assert starts == [1, 5]  # TensorBoard drops what the first session wrote from step 5 on


def test_rewind_after_a_write_is_refused(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.write(1, "train", {"loss": 1})
    with pytest.raises(RuntimeError, match="before the first write"):
        metrics.rewind(0)
    metrics.close()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_plain_line_every_interval():
    stream = io.StringIO()
    progress = Progress(25, 10, 32, every=10, stream=stream)
    for step in range(25):
        progress.advance(loss=2.34567 if step == 5 else None)
        time.sleep(0.002)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step 10/25", "step 20/25", "step 25/25"]
    assert re.fullmatch(
        r"step 20/25, epoch 2\.00, loss 2\.346, \d+\.\d clips/s, 00:00 left", lines[1]
    )


def test_a_plain_line_after_some_seconds_whatever_the_interval(monkeypatch):
    monkeypatch.setattr(metrics, "SILENCE", 0.1)
    stream = io.StringIO()
    progress = Progress(9, 10, 32, every=1000, stream=stream)
    for step in range(4):
        time.sleep(0.15 * (step == 2))
        progress.advance()
    progress.close()
    assert [line.split(",")[0] for line in stream.getvalue().splitlines()] == ["step 3/9"]


def test_a_log_is_no_bar_that_could_be_disabled():
    """By TQDM_DISABLE, which tqdm reads when it is imported."""
    code = (
        "from fluxvit_jax.training.metrics import Progress; "
        "p = Progress(1, 1, 4); p.advance(); p.close()"
    )
    done = limited.run(
        [sys.executable, "-c", code],
        env=tiny.environment(Path()) | {"TQDM_DISABLE": "1"},
    )
    assert done.returncode == 0 and done.stderr.startswith("step 1/1, "), done.stderr


def test_a_terminal_keeps_one_line():
    stream = Terminal()
    progress = Progress(3, 3, 4, stream=stream)
    for _ in range(3):
        progress.advance(loss=1.5)
        time.sleep(0.12)
    progress.close()
    assert stream.getvalue().count("\n") == 1  # the end
    assert "step 3/3, epoch 1.00, loss 1.5" in stream.getvalue().split("\r")[-1]


def test_rate_counts_neither_compilation_nor_evaluation():
    progress = Progress(100, 10, 10, start_step=50, stream=io.StringIO())
    assert progress.clips_per_second == 0
    time.sleep(1)
    progress.advance()  # compiles
    for _ in range(4):
        time.sleep(0.05)
        progress.advance()
    with progress.paused():
        time.sleep(2)
    for _ in range(4):
        time.sleep(0.05)
        progress.advance()
    progress.close()
    # 80 clips in 0.4 s of steps; with the two pauses it would be 24 a second.
    assert 40 < progress.clips_per_second <= 200
