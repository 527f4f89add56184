"""Ends a program that hangs, with the stacks of all its threads and processes in a file."""

import faulthandler
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from fluxvit_jax.distributed import lifelines, storage
from fluxvit_jax.distributed.mesh import host_count, host_index
from fluxvit_jax.distributed.stacks import SIGNAL, STACKS

STATUS = 75  # exit status of what may do better when started again; sysexits.h: EX_TEMPFAIL
POLL_SECONDS = 1.0
CHILD_SECONDS = 0.2  # until a child has written


class Watchdog:
    """Context manager that ends the program unless `alive` is called every `seconds`.

    The clock stands still before the first call of `alive`, and between `pause` and the next one:
    compilation may take as long as it takes. Seconds in which the whole process was stopped, as by
    Ctrl-Z, do not count.

    seconds: 0 for no watchdog; folder: where `stacks.txt` is written if it comes to that; one in a
    bucket is out of reach of a program that hangs, which then keeps it among temporary files.
    """

    def __init__(self, seconds: float, folder: storage.PathLike):
        self._seconds = seconds
        self._folder = None if storage.is_remote(folder) else Path(folder)
        self._beats = 0  # calls of `alive`
        self._paused = True
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            descriptor, self._stacks = tempfile.mkstemp(prefix="fluxvit-stacks-", suffix=".txt")
            os.close(descriptor)
            os.environ[STACKS] = self._stacks  # of processes started from now on
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._seconds:
            self._ended.set()
            self._thread.join()
            os.environ.pop(STACKS, None)
            os.unlink(self._stacks)

    def alive(self) -> None:
        """Tells that a step or batch is finished, and (re)starts the clock."""
        self._beats += 1
        self._paused = False

    def pause(self) -> None:
        """Stops the clock until the next `alive`."""
        self._paused = True

    def _watch(self) -> None:
        beats, waited, before = 0, 0.0, time.monotonic()
        while not self._ended.wait(POLL_SECONDS):
            now = time.monotonic()
            if self._paused or self._beats != beats:
                beats, waited = self._beats, 0.0
            else:
                waited += min(now - before, 2 * POLL_SECONDS)
            before = now
            if waited > self._seconds:
                self._end()

    def _end(self) -> None:
        """Writes the stacks, says so in a line, and ends the process at once."""
        try:
            path = self._write_stacks()
            where = f"the stacks of all threads are in {path}"
        except OSError as error:
            where = f"its stacks cannot be written: {error.strerror}"
        print(
            f"error: nothing was finished for {self._seconds:.0f} s (config.log.watchdog_seconds): "
            f"the program hangs; {where}; the same command goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        lifelines.leave()  # the other hosts write where they hang, too
        os._exit(STATUS)  # an exception would not end a main thread that hangs

    def _write_stacks(self) -> str:
        """Writes the stacks of this process and of the children that `listen`; returns the path."""
        with open(self._stacks, "a") as file:
            file.write(f"process {os.getpid()}\n")
            file.flush()
            faulthandler.dump_traceback(file)
        for child in multiprocessing.active_children():
            if child.pid is None:
                continue
            with open(self._stacks, "a") as file:
                file.write(f"\nprocess {child.pid}, {child.name}\n")
            os.kill(child.pid, SIGNAL)
            time.sleep(CHILD_SECONDS)
        if self._folder is None:
            return self._stacks
        host = f"-{host_index()}" if host_count() > 1 else ""
        return shutil.move(self._stacks, str(self._folder / f"stacks{host}.txt"))
