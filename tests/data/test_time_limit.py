import threading
import time

import pytest

from fluxvit_jax.data.annotations import Example, FileSource
from fluxvit_jax.data.decoding import DecodeError
from fluxvit_jax.data.time_limit import within
from fluxvit_jax.evaluation import evaluate
from fluxvit_jax.evaluation.evaluate import NothingReadableError, check_readable
from tests.data.videos import moving_texture, write_video


def test_results_and_errors_come_through():
    assert within(0, "a.mp4", lambda: threading.current_thread().daemon) is True
    with pytest.raises(ZeroDivisionError):
        within(10, "a.mp4", lambda: 1 // 0)


def test_a_read_that_hangs_is_left_behind():
    with pytest.raises(DecodeError, match=r"a.mp4: hangs: not read within 0.2 s"):
        within(0.2, "a.mp4", lambda: time.sleep(1000))


def test_a_hanging_video_does_not_hang_the_check_before_a_run(tmp_path, monkeypatch):
    write_video(tmp_path / "sound.mp4", moving_texture(3))
    real = evaluate.open_clip
    monkeypatch.setattr(
        evaluate, "open_clip", lambda path: time.sleep(1000) if "hangs" in path else real(path)
    )
    hanging = [Example(f"hangs{i}.mp4", 0, f"{tmp_path}/hangs{i}.mp4") for i in range(2)]
    sound = Example("sound.mp4", 0, f"{tmp_path}/sound.mp4")
    check_readable(FileSource([*hanging, sound]), "list.csv", 0.2)
    message = "list.csv: not one of 2 videos can be read; hangs0.mp4: hangs: not read within 0.2 s"
    with pytest.raises(NothingReadableError, match=message):
        check_readable(FileSource(hanging), "list.csv", 0.2)
