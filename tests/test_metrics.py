"""metrics.jsonl, TensorBoard files and the progress line."""

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from fluxvit_jax.metrics import Metrics, Progress
from tests import tiny


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
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()  # flushed, not closed
    assert [json.loads(line) for line in lines] == [
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


def test_a_log_is_no_bar_that_could_be_disabled():
    """By TQDM_DISABLE, which tqdm reads when it is imported."""
    code = "from fluxvit_jax.metrics import Progress; p = Progress(1, 1, 4); p.advance(); p.close()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=tiny.environment(Path()) | {"TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
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
