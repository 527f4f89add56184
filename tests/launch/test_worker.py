"""launch/worker.sh for real, this machine being a worker of a TPU; the program is a stand-in."""

import subprocess
import sys
import time

import pytest

from tests import limited
from tests.launch.recorder import LAUNCH, ROOT, Answer, error_line

ARGUMENTS = ["--config=configs/k400.py:base", "--config.eval.settings=((1, 2),)", "it's", "$HOME"]

# Runs until the file `end` says with which status to end, or SIGTERM comes.
PROGRAM = f"""#!{sys.executable} -SE
import pathlib, signal, sys, time
home = pathlib.Path.home()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
(home / "arguments").write_text("\\n".join(sys.argv[1:]))
print("working", flush=True)
while not (home / "end").exists():
    time.sleep(0.02)
sys.exit(int((home / "end").read_text()))
"""

# A TPU of one worker, which is this machine.
GCLOUD = """#!/usr/bin/env bash
case $4 in
  describe) echo READY ;;
  scp) cat "$5" > "$HOME/code.tar.gz" ;;
  ssh)
    for word; do
      case $word in --command=*) cd "$HOME" && exec bash -c "${word#--command=}" ;; esac
    done
    ;;
esac
"""


@pytest.fixture
def home(recorders):
    """The home folder of the worker, where `setup` has put what it installs."""
    folder = recorders.folder.parent
    recorders.install("program", PROGRAM)
    for link, tool in (("fluxvit_env/bin/python", "program"), ("fluxvit_tools/bin/uv", "uv")):
        (folder / link).parent.mkdir(parents=True)
        (folder / link).symlink_to(recorders.folder / tool)
    yield folder
    (folder / "end").write_text("9")


def state(recorders) -> str:
    _, said = recorders.run("worker.sh", "state").stdout.split()
    return said


def wait_for(condition) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("waited for 10 s")


def test_a_run_and_its_end(recorders, home):
    assert state(recorders) == "state=none"
    assert recorders.run("worker.sh", "start", *ARGUMENTS).returncode == 0
    assert state(recorders) == "state=running"
    assert "goes on here already" in error_line(recorders.run("worker.sh", "start", *ARGUMENTS))
    wait_for((home / "arguments").exists)
    (home / "end").write_text("1")
    logs = recorders.run("worker.sh", "logs")
    assert logs.returncode == 1 and logs.stdout == "working\n" and "state=1" in logs.stderr
    assert state(recorders) == "state=1"
    assert (home / "arguments").read_text().split("\n") == ["-m", "fluxvit_jax.main", *ARGUMENTS]
    (home / "end").unlink()
    assert recorders.run("worker.sh", "start").returncode == 0, "again, after its end"
    assert state(recorders) == "state=running"


def test_stop(recorders, home):
    assert "no run goes on here" in error_line(recorders.run("worker.sh", "stop"))
    recorders.run("worker.sh", "start", *ARGUMENTS)
    wait_for((home / "arguments").exists)
    assert recorders.run("worker.sh", "stop").returncode == 0
    wait_for(lambda: state(recorders) == "state=143")


def test_a_worker_that_has_restarted(recorders, home):
    """Its notes are there, its process is not, and another has its number now."""
    (home / "fluxvit_run").mkdir()
    for process in ("4194305", "1"):
        (home / "fluxvit_run" / "pid").write_text(process)
        assert state(recorders) == "state=lost"


def test_logs_of_nothing(recorders, home):
    assert "nothing was started here" in error_line(recorders.run("worker.sh", "logs"))


def test_may_write(recorders):
    assert recorders.run("worker.sh", "check", "gs://bucket/run").returncode == 0
    written, deleted = recorders.words()
    assert written[:4] == ["gcloud", "storage", "cp", "-"] and deleted[2] == "rm"
    assert written[4] == deleted[3] and written[4].startswith("gs://bucket/run/")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            "ERROR: HTTPError 403: robot does not have storage.objects.create access\n",
            "no permission to write to gs://bucket/run: gcloud storage buckets "
            "add-iam-policy-binding gs://bucket --member=serviceAccount:robot@iam "
            "--role=roles/storage.objectUser",
        ),
        (
            "ERROR: gs://bucket not found: 404.\n",
            "cannot write to gs://bucket/run: ERROR: gs://bucket not found: 404.",
        ),
    ],
)
def test_may_not_write(answer, message, recorders):
    recorders.answer("storage cp", Answer(err=answer, status=1))
    recorders.answer("config get-value account", Answer("robot@iam\n"))
    assert error_line(recorders.run("worker.sh", "check", "gs://bucket/run")) == f"error: {message}"


def test_setup(recorders, home):
    """Without what is there already; the accelerator's part in one go with the pinned packages."""
    assert recorders.run("worker.sh", "setup").returncode == 0
    words = "uv pip install --quiet --requirement=requirements.txt 'jax[tpu]' '--editable=.[gcs]'"
    assert recorders.calls() == [words]


def test_the_whole_way(recorders, home):
    """`tpu_vm.sh up` on a TPU that is this machine: the code is there, the program runs in it."""
    recorders.install("gcloud", GCLOUD)
    words = ["--name=x", "--zone=z", "--type=v4-8", "--", "--workdir=gs://bucket/run", *ARGUMENTS]
    up = limited.Process(
        [LAUNCH / "tpu_vm.sh", *words],
        env=recorders.environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for((home / "arguments").exists)
    (home / "end").write_text("7")
    out, err = up.communicate()
    assert up.returncode == 7 and out == "working\n", err
    assert (home / "arguments").read_text().split("\n")[2:] == words[4:]
    copied = {path.name for path in (home / "fluxvit_jax").iterdir()}
    assert {"configs", "fluxvit_jax", "launch", "requirements.txt", "pyproject.toml"} < copied
    assert not list((home / "fluxvit_jax").rglob("__pycache__"))
