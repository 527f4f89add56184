"""A process that hangs is killed, with its children, and fails the test that waits for it."""

import subprocess
import sys

import pytest

from tests import limited

# Its child holds the pipe as well, and neither heeds a signal: it is stopped.
STOPPED = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
print("started", child.pid, flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_process_that_hangs_fails_the_test_that_waits():
    with pytest.raises(
        pytest.fail.Exception, match=r"(?s)still running 1 s .*started \d+"
    ) as failed:
        limited.run([sys.executable, "-c", STOPPED], seconds=1)
    child = int(str(failed.value).split()[-1])
    assert limited.wait_until(lambda: not limited.is_running(child))
    process = limited.Process(["sleep", "100"], seconds=0.1)
    with pytest.raises(AssertionError, match=r"still running 0.1 s after its start: sleep"):
        process.wait()


def test_a_process_that_ends_in_time():
    done = limited.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    with pytest.raises(AssertionError, match="status 1"):
        limited.run(["false"], check=True)
    process = limited.Process(["sleep", "0.1"], stdout=subprocess.PIPE)
    assert not limited.wait_until(lambda: False, process)
