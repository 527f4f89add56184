"""The command line: what it prints, its exit status, one line for each mistake."""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.numpy

from fluxvit_jax.checkpoint import restore_params
from fluxvit_jax.convert import names
from tests import tiny


def outcome(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def error_line(err: str) -> str:
    """The one line that says what is wrong; there is no traceback."""
    assert "Traceback" not in err, err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and err.splitlines()[-1] == lines[0], err
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config.train.epoch=3"], r"config.train.epoch: no such field; did you mean .*epochs"),
        (["--config.train.epochs=many"], r"config.train.epochs: 'many' is not a whole number"),
        (["--config.train.budgets=(500,)"], r"no grid can fill 500 tokens, .* has 189"),
        (["--config.data.train=/nowhere.csv"], r"/nowhere.csv: no such file"),
        (["--config.data.train="], r"no training data"),
        (["--mode=dance"], r"mode.*train|evaluate"),
        (["--workdir="], r"no folder for the run given"),
    ],
)
def test_mistakes_are_one_line(tiny_data, compiled, tmp_path, options, message):
    workdir = tmp_path / "run"
    status, out, err = outcome(tiny.start(tiny_data, workdir, compiled, *options))
    assert status == 2 and re.search(message, error_line(err)), err
    assert not out and not workdir.exists()


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_a_run_needs_a_recipe(tmp_path, mode):
    command = [sys.executable, "-m", "fluxvit_jax.main", f"--mode={mode}", f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no recipe given" in error_line(done.stderr)


def test_debug_shows_where(tiny_data, compiled, tmp_path):
    status, _, err = outcome(
        tiny.start(tiny_data, tmp_path, compiled, "--debug", "--config.data.train=/nowhere.csv")
    )
    assert status != 0 and "Traceback" in err and "annotations.py" in err


def test_a_workdir_of_another_config(finished, tiny_data, compiled):
    changed = tiny.start(tiny_data, finished.workdir, compiled, "--config.optim.b2=0.9")
    status, _, err = outcome(changed)
    assert status == 2 and "(optim.b2: 0.999 -> 0.9)" in error_line(err)


def test_damaged_checkpoints(finished, tiny_data, compiled, tmp_path):
    """The best is passed over with a warning; none left is an error."""
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    steps = sorted(p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    for step in steps:
        damage(step)
    for mode in ("train", "evaluate"):
        status, _, err = outcome(tiny.start(tiny_data, workdir, compiled, f"--mode={mode}"))
        assert status == 2 and re.search(r"intact|damaged", error_line(err))
    assert sorted(p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()) == steps


def damage(step: Path) -> None:
    """Flips one bit in the middle of the parameters."""
    file = max((step / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_weights_of_another_model(finished, tiny_data, compiled, tmp_path):
    params = restore_params(finished.workdir)
    path = tmp_path / "model.safetensors"
    state = names.to_official(params)
    del state["gpe_proj.depthwise_conv.bias"]
    safetensors.numpy.save_file(state, path)
    runs = {
        f"{path}": r"gpe_proj.depthwise_conv.bias",
        f"{finished.workdir}": r"another model; wrong shape: align.head.bias .* instead of",
    }
    for source, message in runs.items():
        options = [f"--config.train.init_from={source}"]
        options += ["--config.model.variant=S"] * (source != str(path))
        workdir = tmp_path / "run"
        status, _, err = outcome(tiny.start(tiny_data, workdir, compiled, *options))
        assert status == 2 and re.search(message, error_line(err)), err
        assert not (workdir / "config.json").exists()


def test_evaluate_prints_a_table(finished, tiny_data, compiled):
    status, out, err = outcome(tiny.start(tiny_data, finished.workdir, compiled, "--mode=evaluate"))
    assert status == 0, err
    assert "leaked" not in err and "Traceback" not in err
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["budget", "frames", "resolution", "tokens", "head", "top-1", "top-5"]
    assert [row[0] for row in rows[1:3]] == ["24", "12"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_has_begun(tiny_data, compiled, tmp_path, number):
    process = tiny.start(tiny_data, tmp_path, compiled)
    time.sleep(2)  # while it imports or compiles
    process.send_signal(number)
    status, _, err = outcome(process)
    assert status == 128 + number and "Traceback" not in err
