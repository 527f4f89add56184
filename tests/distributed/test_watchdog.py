"""A program that hangs: it ends with a status of its own and tells where it hung."""

import subprocess
import sys
import threading

import pytest

from fluxvit_jax.distributed.watchdog import STATUS, Watchdog
from tests import limited

HANGING = """
import ctypes, multiprocessing, sys, time

from fluxvit_jax.distributed import stacks, watchdog


def read_for_ever():
    stacks.listen()
    ready.set()
    ctypes.CDLL(None).sleep(1000)


context = multiprocessing.get_context("fork")
ready = context.Event()
with watchdog.Watchdog(3, {folder!r}) as dog:
    child = context.Process(target=read_for_ever, name="reader", daemon=True)
    child.start()
    ready.wait()
    dog.alive()
    {hang}
"""


@pytest.fixture
def run(tmp_path):
    def run(hang: str) -> subprocess.CompletedProcess:
        program = HANGING.format(folder=str(tmp_path), hang=hang)
        return limited.run([sys.executable, "-c", program])

    return run


def test_a_hang_in_c_ends_with_stacks_of_all_processes(run, tmp_path):
    ended = run("ctypes.CDLL(None).sleep(1000)")
    assert ended.returncode == STATUS, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: nothing was finished for 3 s (config.log.watchdog_seconds): ")
    assert str(tmp_path / "stacks.txt") in line
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "reader\n" in stacks and "in read_for_ever" in stacks and "in _watch" in stacks


@pytest.mark.slow
def test_what_is_alive_or_paused_goes_on(run, tmp_path):
    ended = run("[(time.sleep(0.5), dog.alive()) for _ in range(9)]; dog.pause(); time.sleep(5)")
    assert (ended.returncode, ended.stderr) == (0, "") and not list(tmp_path.iterdir())


def test_zero_seconds_are_no_watchdog(tmp_path):
    before = threading.active_count()
    with Watchdog(0, tmp_path):
        assert threading.active_count() == before
