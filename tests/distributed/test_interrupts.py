"""Ctrl-C and SIGTERM while a program is compiled, which no handler in Python would hear."""

import signal
import subprocess
import sys

import pytest
from etils import epath

from fluxvit_jax.checkpoints.checkpointer import find_fault
from fluxvit_jax.checkpoints.workdir import metrics_by_step
from fluxvit_jax.distributed.interrupts import (
    ended_by_signals,
    ended_by_signals_again,
    handled_by,
)
from tests import limited, tiny

FORKS = """
import os, signal, time
from fluxvit_jax.distributed.interrupts import ended_by_signals
with ended_by_signals():
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
        os.write(writer, b"ready")
        while True:
            time.sleep(1)
    os.read(reader, 5)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

WITHOUT_STDERR = """
import os, signal, time
from fluxvit_jax.distributed.interrupts import ended_by_signals
os.close(2)
with ended_by_signals():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("mode", ["train", pytest.param("preflight", marks=pytest.mark.slow)])
def test_a_program_that_compiles_ends_at_once(tiny_data, tmp_path, mode, number):
    options = [f"--mode={mode}", "--config.preflight.topology=cpu:1"]
    process = tiny.start(tiny_data, tmp_path / "run", tmp_path / "nothing_compiled", *options)
    compiling = next(line for line in process.stderr if "compiling the training step" in line)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 128 + number
    assert err.endswith("interrupted\n") and "Traceback" not in err
    assert "compiled training step" not in err  # as training goes on with
    assert f"{compiling.strip()}: " not in err and "fits" not in out  # as a pre-flight does


def test_the_first_evaluation_ends_at_once_and_loses_no_step(tiny_data, compiled, tmp_path):
    process = tiny.start(tiny_data, tmp_path / "run", compiled)
    begun = next(line for line in process.stderr if "the first evaluation" in line)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert err.endswith("interrupted\n") and "Traceback" not in err
    step = begun.split("step ")[1].split(":")[0]
    assert find_fault(epath.Path(tmp_path / "run" / "checkpoints" / step)) is None
    assert metrics_by_step(epath.Path(tmp_path / "run"), "validation") == []


def test_a_signal_of_a_forked_child_is_its_own():
    done = limited.run([sys.executable, "-c", FORKS], stdout=subprocess.PIPE, check=True)
    assert done.stdout == "7\n"


def test_it_ends_without_a_place_for_its_last_word():
    done = limited.run([sys.executable, "-c", WITHOUT_STDERR])
    assert done.returncode == 128 + signal.SIGTERM


def test_in_a_notebook_nothing_is_replaced():
    before = signal.getsignal(signal.SIGTERM)
    with ended_by_signals_again():
        assert signal.getsignal(signal.SIGTERM) is before
    with ended_by_signals(), handled_by(print), ended_by_signals_again():
        assert signal.getsignal(signal.SIGTERM) not in (before, print)


def test_all_is_as_before_after_the_context():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ended_by_signals():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1
