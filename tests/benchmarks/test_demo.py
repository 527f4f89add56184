"""A short form of `make demo`, whole: files, training, a stop, evaluation, table and picture."""

import signal
import subprocess
import sys

import cv2
import pytest

from tests import limited, tiny

SHORT = ("--train=36", "--validation=12", "--epochs=2")
STEPS = 4  # of 16 clips


def start(out, compiled) -> limited.Process:
    return limited.Process(
        [sys.executable, "-m", "benchmarks.demo", f"--out={out}", *SHORT],
        env=tiny.environment(compiled),
        cwd=tiny.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # with a process group of its own, as in a terminal
    )


def interrupt(out, compiled) -> None:
    """Ctrl-C, while clips are written. Stops of training are in tests/training."""
    process = start(out, compiled)
    assert limited.wait_until(lambda: list(out.rglob("*.mp4")), process)
    limited.run(["kill", f"-{signal.SIGINT.value}", "--", f"-{process.pid}"], check=True)
    printed, _ = process.communicate()
    assert process.returncode == 130, printed
    assert "Traceback" not in printed, printed


@pytest.mark.slow
def test_the_demo(compiled, tmp_path):
    out = tmp_path / "demo"
    interrupt(out, compiled)
    process = start(out, compiled)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed

    for method in ("multi", "fixed"):
        lines = tiny.read_lines(out / method / "metrics.jsonl")
        assert lines[-1]["step"] == STEPS and lines[-1]["split"] == "validation"
        report, _ = tiny.read_evaluation(out / method)
        assert report["dataset"]["videos"] == 12 and not report["failures"]
        assert list(report["budgets"]) == ["128", "64", "32"]
        for budget, own in report["budgets"].items():
            assert f"{own['top1']:.1%} ({own['frames']} x {own['resolution']})" in printed, budget
    picture = cv2.imread(str(out / "demo.png"))
    assert picture is not None and min(picture.shape[:2]) > 500
