"""One run at a time in a workdir: with real processes, on this machine and as if on another."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from fluxvit_jax.checkpoints import workdir_lock
from fluxvit_jax.checkpoints.workdir_lock import FILE, WorkdirLock
from fluxvit_jax.errors import UserError
from tests import limited, tiny

HOLD = """
import sys, time
from etils import epath
from fluxvit_jax.checkpoints.workdir_lock import WorkdirLock
with WorkdirLock(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path, compiled):
    """A process that holds the lock of the folder."""
    process = limited.Process(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env=tiny.environment(compiled),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def quick(monkeypatch):
    """Leases of another machine are stale after a second."""
    monkeypatch.setattr(workdir_lock, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(workdir_lock, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(workdir_lock, "LEASE_SECONDS", 1.0)


def lease_of(folder) -> dict:
    return json.loads((folder / FILE).read_text())


def elsewhere(folder) -> dict:
    """Makes the lease one of another machine."""
    lease = lease_of(folder) | {"machine": "another", "host": "node7"}
    (folder / FILE).write_text(json.dumps(lease))
    return lease


def test_it_is_held_and_let_go(tmp_path):
    folder = epath.Path(tmp_path) / "new"
    with WorkdirLock(folder) as lock:
        assert lease_of(folder)["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on"):
            WorkdirLock(folder).__enter__()
        lock.check()
    assert not (folder / FILE).exists()
    with WorkdirLock(folder):
        pass


def test_a_live_holder_is_refused_at_once(holder, tmp_path):
    with pytest.raises(UserError, match=f"is in use by process {holder.pid} on .*; stop that run"):
        WorkdirLock(epath.Path(tmp_path)).__enter__()
    holder.send_signal(signal.SIGSTOP)  # it may be continued, so it still holds
    with pytest.raises(UserError, match="is in use by"):
        WorkdirLock(epath.Path(tmp_path)).__enter__()


def test_a_killed_holder_is_taken_over_at_once(holder, tmp_path, capsys):
    """Not reaped by its parent, which is this process: it is a zombie."""
    holder.kill()
    limited.wait_until(lambda: workdir_lock._start_of(holder.pid) is None)
    with WorkdirLock(epath.Path(tmp_path)):
        assert lease_of(tmp_path)["pid"] == os.getpid()
    assert f"taking over {tmp_path} from process {holder.pid}" in capsys.readouterr().err


def test_a_lease_of_another_machine_that_is_not_renewed_is_taken_over(
    holder, tmp_path, quick, capsys
):
    holder.send_signal(signal.SIGSTOP)
    elsewhere(tmp_path)
    with WorkdirLock(epath.Path(tmp_path)) as lock:
        assert lease_of(tmp_path)["pid"] == os.getpid()
        lock.check()
    said = capsys.readouterr().err
    assert "watching for 1 s" in said and f"taking over {tmp_path} from process" in said


def test_a_lease_of_another_machine_that_is_renewed_is_respected(tmp_path, quick):
    folder = epath.Path(tmp_path)
    with WorkdirLock(folder) as lock:
        # Its own renewals go on as from another machine.
        lock._lease |= {"machine": "another", "host": "node7"}
        elsewhere(tmp_path)
        with pytest.raises(UserError, match=r"is in use by process \d+ on node7"):
            WorkdirLock(folder).__enter__()


def test_who_was_taken_over_stops(tmp_path, quick):
    with WorkdirLock(epath.Path(tmp_path)) as lock:
        other = elsewhere(tmp_path) | {"token": "theirs"}
        (tmp_path / FILE).write_text(json.dumps(other))
        deadline = time.monotonic() + 10
        while lock._taken_by is None and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(UserError, match=r"was taken over by process .* on node7"):
            lock.check()
    assert lease_of(tmp_path)["token"] == "theirs"  # left alone


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_lease_does_not_lock_for_ever(tmp_path, quick, content):
    (tmp_path / FILE).write_text(content)
    with WorkdirLock(epath.Path(tmp_path)):
        assert lease_of(tmp_path)["pid"] == os.getpid()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written: Not a directory"):
        WorkdirLock(epath.Path(tmp_path / "file" / "run")).__enter__()


@pytest.mark.slow
def test_two_runs_in_one_workdir(tiny_data, compiled, tmp_path):
    """Started at the same moment: one trains, undisturbed, and the other is refused."""
    options = (tiny_data, tmp_path / "run", compiled, "--config.train.epochs=1")
    runs = [tiny.start(*options) for _ in range(2)]
    logs = [run.communicate()[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], logs
    refused = logs[[run.returncode for run in runs].index(2)]
    assert "run is in use by process" in refused.splitlines()[-1]
    steps = [line["step"] for line in tiny.read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert sorted(steps) == [1, 2, 3, 4, 4]
