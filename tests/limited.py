"""Processes that tests start, none of which can hold the suite up: each has a time limit."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

LIMIT = 300.0  # seconds; several times what the slowest takes while all cores are busy
POLL_SECONDS = 0.01


class Process(subprocess.Popen):
    """A process that is killed `seconds` after its start, with all that it has started.

    Whatever waits for it or reads from it goes on then, and `communicate` or `wait` fails the test.
    """

    def __init__(self, command: Sequence[Any], *, seconds: float = LIMIT, **options: Any):
        self._late = self._communicating = False
        super().__init__(command, **options)
        self._limit = seconds
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def communicate(self, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        self._communicating = True
        out, err = super().communicate(*arguments, **options)
        self._check(f"; it wrote:\n{out or ''}{err or ''}")
        return out, err

    def wait(self, *arguments: Any, **options: Any) -> int:
        status = super().wait(*arguments, **options)
        if not self._communicating:  # which waits as well, and then says what was written
            self._check("")
        return status

    def _check(self, more: str) -> None:
        self._timer.cancel()
        if self._late:
            words = " ".join(map(str, self.args))[:500]
            raise AssertionError(f"still running {self._limit:g} s after its start: {words}{more}")

    def _end(self) -> None:
        if self.poll() is None:
            self._late = True
            for process in (*descendants(self.pid), self.pid):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)


def run(
    command: Sequence[Any], *, check: bool = False, seconds: float = LIMIT, **options: Any
) -> subprocess.CompletedProcess:
    """`subprocess.run` with a time limit; by default both outputs are kept, as text."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = Process(command, seconds=seconds, **pipes | options)
    out, err = process.communicate()
    assert not (check and process.returncode), f"status {process.returncode}: {command}\n{err}"
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def wait_until(condition: Callable[[], Any], process: subprocess.Popen | None = None) -> bool:
    """Waits for a condition; False if the process ends before. Fails the test after `LIMIT`."""
    end = time.monotonic() + LIMIT
    while not condition():
        if process is not None and process.poll() is not None:
            return False
        assert time.monotonic() < end, f"waited {LIMIT:g} s in vain"
        time.sleep(POLL_SECONDS)
    return True


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def descendants(pid: int) -> list[int]:
    """The processes that one has started, and those that they have (Linux)."""
    found = []
    with suppress(OSError):  # they may end meanwhile
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found
