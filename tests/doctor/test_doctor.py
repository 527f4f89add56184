"""The doctor on this machine: what holds, and what is really broken and said."""

import contextlib
import re
import sys
import time
from pathlib import Path

import jax
import pytest

from fluxvit_jax.doctor import __main__ as doctor
from fluxvit_jax.doctor import machine, runs, videos, workdir
from fluxvit_jax.doctor.outcome import FAILED, OK, FailedError, Place, outcome_of
from tests import limited, tiny

READ_ONLY = "/sys/doctor"  # nobody can make a folder there


@pytest.fixture
def place(tmp_path) -> Place:
    (tmp_path / "scratch").mkdir()
    return Place(str(tmp_path / "folder"), str(tmp_path / "scratch"), time.monotonic() + 300)


def test_all_but_whole_runs(compiled, tmp_path, capsys):
    """As users run it, in processes; nothing stays behind."""
    names = [check.name for check in doctor.CHECKS if check.name not in doctor.RUNS]
    status = doctor.main([f"--workdir={tmp_path}/new/runs", f"--only={','.join(names)}"])
    told = capsys.readouterr()
    rows = [line.split(maxsplit=1) for line in told.out.splitlines() if line[0] != " "]
    results = {name: rest.split(" ")[0] for name, rest in rows[:-1]}
    assert list(results) == names
    # A machine of tests may be small.
    assert all(results[name] == "ok" for name in names if name not in ("memory", "space")), told.out
    assert status == int("FAILED" in results.values())
    assert [line.split(":")[0] for line in told.err.splitlines()] == names
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_whole_runs(compiled, place):
    assert re.fullmatch(
        r"killed at step \d+ of 16, resumed: weights and metrics bit-equal", runs.resume(place)
    )
    assert runs.damage(place).startswith("a flipped bit in step 16 noticed, gone on from 14, ")


@pytest.mark.slow
def test_a_workdir_that_cannot_be_written(compiled, capsys):
    assert doctor.main([f"--workdir={READ_ONLY}", "--only=space,lock,decoders,resume"]) == 1
    out = capsys.readouterr().out
    for name in ("space", "lock"):
        assert re.search(
            rf"^{name} +FAILED   {READ_ONLY}: (Operation|Permission|Read-only)", out, re.M
        )
    assert re.search(r"^decoders +ok ", out, re.M)
    assert re.search(
        r"^resume +FAILED   training ends with status 2: /sys/doctor/doctor-", out, re.M
    )
    assert out.count("-> ") == 3 and "\n3 FAILED: space, lock, resume; " in out


# --- What is broken is said


def test_a_wrong_kernel(place, monkeypatch):
    assert outcome_of("machine.attention", place).result == OK
    real = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args: 1.01 * real(*args))
    outcome = outcome_of("machine.attention", place)
    assert outcome.result == FAILED and re.match(r"xla\b.* wrong; float32,", outcome.detail)


def test_a_wrong_product(place, monkeypatch):
    real = jax.numpy.matmul
    monkeypatch.setattr(jax.numpy, "matmul", lambda a, b: real(a, b).at[3, 3].add(1.0))
    with pytest.raises(FailedError, match="a product of matrices is off by"):
        machine.devices(place)


def test_other_versions_than_asked_for(place, monkeypatch):
    asked = ['jax<0.1; python_version > "3"', "no-such-package>=1", 'other; extra == "gcs"']
    monkeypatch.setattr(machine.metadata, "requires", lambda _: asked)
    with pytest.raises(FailedError, match=rf"; jax is {jax.__version__} and not <0.1, no-such-pa"):
        machine.versions(place)


def test_too_little_room(place, monkeypatch):
    sizes = {"/dev/shm": 64 << 20, place.folder: 10**9}
    usage = machine.shutil.disk_usage

    def disk_usage(path):
        return usage("/")._replace(free=sizes[str(path)])

    monkeypatch.setattr(machine.shutil, "disk_usage", disk_usage)
    for check in (machine.memory, workdir.space):
        with pytest.raises(FailedError, match="free"):
            check(place)


def test_a_clock_that_is_off(place, monkeypatch):
    monkeypatch.setattr(workdir.time, "time", lambda: 1e9)
    with pytest.raises(FailedError, match=r"files are dated \d+ s off"):
        workdir.clock(place)


def test_storage_that_does_not_rename(place, monkeypatch):
    def write(path: Path, content: bytes) -> None:
        with open(path, "wb") as file:
            for start in range(0, len(content), 1 << 10):
                file.write(content[start : start + (1 << 10)])
                file.flush()

    monkeypatch.setattr(workdir.atomic, "write", write)
    with pytest.raises(FailedError, match="reads found half a file"):
        workdir.writes(place)


def test_a_lock_that_keeps_nobody_out(place, monkeypatch):
    monkeypatch.setattr(workdir, "WorkdirLock", contextlib.nullcontext)
    with pytest.raises(FailedError, match="a second process took the folder"):
        workdir.lock(place)


def test_frames_that_are_not_those_written(place, monkeypatch):
    real = videos.Video.read
    monkeypatch.setattr(videos.Video, "read", lambda *args: 255 - real(*args))
    with pytest.raises(FailedError, match=r"H\.264: frames are off by"):
        videos.decoders(place)


def test_batches_that_differ(place, monkeypatch):
    def other_seed(config, source):
        config.seed += config.data.workers
        return real(config, source)

    real = videos.train_batches
    monkeypatch.setattr(videos, "train_batches", other_seed)
    with pytest.raises(FailedError, match="differs after a worker was killed"):
        videos.workers(place)


# --- Processes

CRASHING = """
import os, signal, sys, time
from fluxvit_jax.doctor import child, outcome

def crash(check, place):
    print("the file is odd", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)

if __name__ != "__main__":  # in the process of the check
    {change}
else:
    place = outcome.Place("", sys.argv[1], 0.0)
    print(child.outcome_in_child("machine.memory", place, {seconds}))
"""


@pytest.mark.parametrize(
    ("change", "seconds", "detail"),
    [
        (
            "child.outcome_of = crash",
            60,
            "its process crashed with status -11; the file is odd",
        ),
        ("child.outcome_of = lambda *_: time.sleep(100)", 2, "hangs: not done in 2 s"),
    ],
)
def test_a_check_that_crashes_or_hangs(tmp_path, compiled, change, seconds, detail):
    program = tmp_path / "program.py"
    program.write_text(CRASHING.format(change=change, seconds=seconds))
    done = limited.run(
        [sys.executable, program, tmp_path],
        env=tiny.environment(compiled),
    )
    assert f"Outcome(result='FAILED', detail='{detail}'" in done.stdout, done.stderr


def test_wrong_command_lines(capsys):
    assert doctor.main(["--only=lok"]) == 2
    assert capsys.readouterr().err.startswith("error: --only=lok: none of versions, devices, ")
    assert doctor.main(["--workdir"]) == 2
