"""A process that hangs is killed, with its children, and fails the test that waits for it."""

import subprocess

import pytest

from tests import limited

# Its child holds the pipes as well, and it heeds no other signal.
STOPPED = "sleep 100 & echo started $!; kill -STOP $$"


def test_a_process_that_hangs_fails_the_test_that_waits():
    message = r"(?s)still running 1 s after its start: sh .*it wrote:\nstarted \d+\n"
    with pytest.raises(AssertionError, match=message) as failed:
        limited.run(["sh", "-c", STOPPED], seconds=1)
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
