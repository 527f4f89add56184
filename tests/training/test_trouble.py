"""What goes wrong outside of a run: a killed data worker, a full disk, another version's files."""

import contextlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import fluxvit_jax
from benchmarks.soak import workers_of
from fluxvit_jax.checkpoints.checkpointer import Checkpoints, restore, restore_params
from fluxvit_jax.convert.__main__ import main as convert_main
from fluxvit_jax.deploy import export, predict
from fluxvit_jax.errors import UserError
from fluxvit_jax.training import metrics
from fluxvit_jax.training.train import train
from tests import limited, tiny
from tests.test_main import error_line, outcome, outcome_here
from tests.training.test_train import KILLED

# --- A killed worker. That of training is in test_train.py.


def test_workers_of_evaluation_that_are_killed_again_are_one_line(
    finished, tiny_data, compiled, tmp_path
):
    many = tmp_path / "many.csv"  # the same few videos, for long enough
    many.write_text("path,label\n" + "".join(f"{i % 16}.mp4,{i % 4}\n" for i in range(4000)))
    options = ["--mode=evaluate", "--config.data.workers=2", f"--config.data.validation={many}"]
    options.append(f"--config.data.root={tiny_data}")
    process = tiny.start(tiny_data, finished.workdir, compiled, *options)
    # Not the one that looks before whether anything can be read.
    limited.wait_until(lambda: len(workers_of(process.pid)) == 2, process)
    while process.poll() is None:
        for worker in workers_of(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        time.sleep(0.02)
    _, err = process.communicate()
    assert process.returncode == 2 and f"{KILLED}lower data.workers" in error_line(err), err


# --- A full disk


@pytest.fixture
def small_disk(tmp_path, request):
    """A file system of its own, of as many KiB as the test asks for."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(folder)]
    if os.geteuid() or limited.run(command).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    limited.run(["umount", "-l", str(folder)], check=True)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("small_disk", [4096], indirect=True)
def test_a_full_disk_in_training_leaves_earlier_checkpoints(tiny_data, compiled, small_disk):
    """There is room for one and a half."""
    status, _, err = outcome(tiny.start(tiny_data, small_disk / "run", compiled))
    assert status == 2, err
    path = small_disk / "run/checkpoints/4"
    assert error_line(err) == (
        f"error: checkpoint {path} could not be written: No space left on device; those before are "
        "intact"
    )
    params = restore_params(small_disk / "run")
    assert np.isfinite(params["pos_embed"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("small_disk", [12], indirect=True)
def test_a_full_disk_for_metrics_is_one_line(tiny_data, compiled, small_disk):
    options = ["--config.checkpoint.every_steps=1000", "--config.eval.every_epochs=5"]
    status, _, err = outcome(tiny.start(tiny_data, small_disk / "run", compiled, *options))
    assert status == 2, err
    assert "disk/run: No space left on device; make room and start the same" in error_line(err)


@pytest.mark.parametrize("small_disk", [64], indirect=True)
def test_tensorboard_ends_early_on_a_full_disk(small_disk, caplog):
    """Its thread must live on: the run would wait for it forever."""
    files = metrics.EventFiles()
    file = files.open(f"file:{small_disk}/events")
    for _ in range(100):
        file.write(bytes(1000))
        file.flush()
    file.close()
    assert caplog.text.count("events ends here: No space left on device") == 1


@pytest.mark.parametrize("name", ["out.safetensors", "out.pth", "folder", "--workdir"])
@pytest.mark.parametrize("small_disk", [300], indirect=True)
def test_convert_to_a_full_disk_is_one_line(finished, small_disk, name, capsys):
    if name == "out.pth":
        pytest.importorskip("torch", reason="writing .pth needs PyTorch")
    options = [name] if name == "--workdir" else []
    target = small_disk / ("run" if options else name)
    assert convert_main([str(finished.workdir), str(target), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "No space left on device" in line and str(target) in line
    assert not [path for path in content_of(small_disk) if "unfinished" in path]


@pytest.mark.parametrize("small_disk", [300], indirect=True)
def test_export_to_a_full_disk_is_one_line(finished, small_disk):
    with pytest.raises(UserError, match="exported: cannot be written: No space left on device"):
        export.run(str(finished.workdir), str(small_disk / "exported"))
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize("small_disk", [16], indirect=True)
@pytest.mark.parametrize("video", ["1.mp4", ""])
def test_predict_to_a_full_disk_is_one_line(finished, tiny_data, small_disk, video):
    options = predict.Options(
        weights=str(finished.workdir),
        out=str(small_disk),
        tokens=(),
        network="",
        dtype=None,
        video=str(tiny_data / video),
        features="tokens",
    )
    with pytest.raises(UserError, match=r"cannot be written: .*No space left on device"):
        predict.run(options)


@pytest.mark.parametrize("small_disk", [65536], indirect=True)
def test_an_evaluation_on_a_read_only_disk_is_printed(finished, tiny_data, small_disk, capsys):
    """Nothing that was computed is lost."""
    workdir = shutil.copytree(finished.workdir, small_disk / "run")
    before = content_of(workdir)
    limited.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    status, out, err = outcome_here(capsys, tiny_data, workdir, "--mode=evaluate")
    assert status == 2, err
    assert "run: Read-only file system; make it writable and start the same" in error_line(err)
    assert "top-1" in out and content_of(workdir) == before


# --- A workdir of a later version


def test_a_workdir_of_a_later_version_is_named(finished, tiny_data, tmp_path):
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    path = workdir / "config.json"
    content = json.loads(path.read_text())
    assert content["version"] == fluxvit_jax.__version__
    content["version"] = "9.1"
    content["model"]["flux"] = 3
    path.write_text(json.dumps(content))
    message = (
        f"{path}: written by version 9.1 of fluxvit_jax; this is version {fluxvit_jax.__version__},"
        " which does not know its model.flux"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        train(tiny.make_config(tiny_data), workdir)

    del content["version"], content["model"]["flux"]  # a run from before versions were noted
    path.write_text(json.dumps(content))
    assert train(tiny.make_config(tiny_data), workdir) == 0


def test_a_checkpoint_of_a_later_version_is_named(tmp_path):
    config = tiny.make_config("nowhere").to_dict()
    config["model"]["flux"] = 3
    with Checkpoints(tmp_path, keep=1, every=1) as checkpoints:
        checkpoints.save(1, {"params": {"a": np.zeros(2)}}, {}, config | {"version": "9.1"})
    message = "1/config: written by version 9.1 of fluxvit_jax; .* does not know its model.flux$"
    with pytest.raises(UserError, match=message):
        restore(tmp_path)
