"""Worker processes with a time limit for each clip, replaced when they hang or die.

A decoder may loop forever or crash on a damaged file, and a network drive may stop answering. A
worker therefore says which clip it is at (`reading`), and the main process, which never waits for
longer than `POLL_SECONDS`, replaces a worker that is at one clip for too long or that dies. The
clip goes into the quarantine: reading it again raises DecodeError with the reason, as any bad file
does. What the worker had still to do is done again by others.

Grain's workers serve the same purpose, but a hanging one blocks its iterator for good, and one that
dies ends it without a word about the clip.
"""

import array
import contextlib
import ctypes
import heapq
import itertools
import logging
import mmap
import multiprocessing
import multiprocessing.resource_tracker
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, util
from multiprocessing.process import BaseProcess
from typing import IO, Any

import cv2

from fluxvit_jax.data.decoding import DecodeError
from fluxvit_jax.distributed import stacks
from fluxvit_jax.distributed.interrupts import SIGNALS
from fluxvit_jax.errors import UserError

POLL_SECONDS = 0.1  # within which the main process hears a signal
START_SECONDS = 600  # of importing and unpickling, which a cold network drive may take
KILL_SECONDS = 5  # to wait for a killed process; one that waits for a dead drive stays longer
SHARED_MEMORY = "/dev/shm"
MAX_MESSAGE = 1 << 16  # bytes; sockets of this kind take messages of 200 KB
ALIGNMENT = 64  # bytes, of arrays in shared memory

# Deaths that are the fault of the clip. For lack of memory the kernel sends SIGKILL or SIGBUS.
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)

Number = Any  # a number, or another small value with an order, such as a tuple of numbers
Make = Callable[[Number], Any]
Quarantine = dict[str, str]  # clip -> why it is not to be read
Received = tuple[tuple[Any, ...], int | None]  # a message, and the descriptor of a file with it


def check_shared_memory(setting: str, needed: int) -> None:
    """Raises UserError if shared memory is short; a worker would just die of a bus error.

    setting: the number of workers, as users call it; needed: bytes.
    """
    if not os.path.isdir(SHARED_MEMORY):
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"{setting}: the workers need {needed >> 20} MB of shared memory and "
            f"{SHARED_MEMORY} has {free >> 20} free; enlarge it (docker: --shm-size) or use fewer"
        )


class SupervisedWorkers:
    """Processes that compute `make(number)`; see the module. Close them.

    Args:
      make: is pickled, and called in the workers.
      workers: number of processes.
      clip_seconds: time limit for a clip, of the main process's own waiting, so that a suspended
        machine charges none; 0: none.
      quarantine: clips that are not to be read; grows. If it is part of `make` as well, workers
        read it there.
      ahead: numbers given to a worker at a time.
      dying: line of the error if workers die again and again and it is no clip's fault, with {} for
        how; it says what to do.

    Attributes:
      clips_read: number of clips that were read so far, some of them twice.
    """

    def __init__(
        self,
        make: Make,
        workers: int,
        clip_seconds: float,
        quarantine: Quarantine,
        ahead: int,
        dying: str,
    ):
        self._clip_seconds, self._quarantine, self._ahead = clip_seconds, quarantine, ahead
        self._dying = dying
        self._job, self._job_sizes = _pack((make, quarantine))  # pickled together: one object
        self._in_job = set(quarantine)
        self.clips_read = 0
        self._pending: list[Number] = []  # a heap of numbers that no worker has
        self._killed_at: str | None = None  # clip of the last death that was charged to none
        self._workers: list[_Worker] = []
        # Before the interpreter's end, which waits for processes that ignore its SIGTERM.
        self._end = util.Finalize(self, _kill, args=(self._workers,), exitpriority=10)
        with _stop_signals_blocked():
            for _ in range(workers):
                self._start_worker()

    def submit(self, number: Number) -> None:
        """Has `make(number)` computed. Smaller numbers come first."""
        heapq.heappush(self._pending, number)

    def finished(self) -> list[tuple[Number, Any]]:
        """(number, result) of what was finished since the last call; waits up to `POLL_SECONDS`.

        An exception that `make` raised is a result.

        Raises UserError: workers die again and again, and it is no clip's fault.
        """
        self._assign()
        begin = time.monotonic()
        watched = [(w.channel.fileno(), w.process.sentinel) for w in self._workers]
        connection.wait(itertools.chain(*watched), POLL_SECONDS)
        waited = min(time.monotonic() - begin, POLL_SECONDS)
        results: list[tuple[Number, Any]] = []
        for worker in list(self._workers):
            died = worker.process.exitcode is not None  # before what it has said is read
            begun = worker.clips_read
            heard = worker.hear(results)
            self.clips_read += worker.clips_read - begun
            if died:
                self._replace(worker, *self._blame_death(worker))
            elif heard or not worker.busy:
                worker.silent = 0.0
            else:
                worker.silent += waited
                limit = self._clip_seconds if worker.ready else START_SECONDS
                if self._clip_seconds and worker.silent > limit:
                    self._replace(worker, *self._blame_silence(worker))
        return results

    def went_on(self) -> None:
        """Notes that the work goes on: deaths before now say nothing about the next one."""
        self._killed_at = None

    def close(self) -> None:
        """Kills the processes; they have nothing to lose."""
        self._end()

    def _start_worker(self) -> None:
        worker = _Worker()
        worker.channel.send(("job", self._job_sizes), self._job)
        for clip in self._quarantine.keys() - self._in_job:
            worker.channel.send(("skip", clip, self._quarantine[clip]))
        self._workers.append(worker)

    def _assign(self) -> None:
        """Gives numbers to workers, the smallest to the one with the fewest."""
        while self._pending:
            worker = min(self._workers, key=lambda worker: len(worker.numbers))
            if len(worker.numbers) >= self._ahead:
                return
            number = heapq.heappop(self._pending)
            worker.numbers.append(number)
            worker.channel.send(("make", number))

    def _blame_death(self, worker: "_Worker") -> tuple[str, str]:
        """(clip, reason) to charge for a worker's death; no clip if it is no clip's fault."""
        code, clip = worker.process.exitcode or 0, worker.clip
        how = _how_it_ended(code)
        if clip and (-code in CRASHES or code > 0):
            return clip, f"crashes its reader, which {how}"
        if clip and clip == self._killed_at:
            return clip, f"its reader {how}, twice at this clip"
        self._note_unexplained(worker, how)
        return "", how

    def _blame_silence(self, worker: "_Worker") -> tuple[str, str]:
        if worker.clip:
            return worker.clip, f"hangs: not read within {self._clip_seconds:g} s"
        how = f"did nothing for {worker.silent:.0f} s"
        self._note_unexplained(worker, how)
        return "", how

    def _note_unexplained(self, worker: "_Worker", how: str) -> None:
        if self._killed_at is not None:
            raise UserError(self._dying.format(how))
        self._killed_at = worker.clip

    def _replace(self, worker: "_Worker", clip: str, reason: str) -> None:
        """Replaces a worker, whose numbers others take over; the clip goes into the quarantine."""
        self._workers.remove(worker)
        _kill([worker])
        for number in worker.numbers:
            heapq.heappush(self._pending, number)
        if not clip:
            logging.warning("a worker that reads data %s; it is replaced", reason)
        elif clip not in self._quarantine:  # else two workers were at it
            self._quarantine[clip] = reason
            for other in self._workers:
                other.channel.send(("skip", clip, reason))
            logging.warning("%s: %s; it is skipped from now on, the worker replaced", clip, reason)
        with _stop_signals_blocked():
            self._start_worker()


class _Worker:
    """A worker process, seen from the main process.

    Attributes:
      numbers: what it has to do, in order.
      clip: the one it is at, "" between two.
      clips_read: number of clips before that.
      silent: seconds that the main process has waited since it last said something.
      ready: whether it has unpickled its job.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        context = multiprocessing.get_context("spawn")
        self.process: BaseProcess = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.channel = _Channel(ours)
        self.numbers: list[Number] = []
        self.clip = ""
        self.clips_read = 0
        self.silent = 0.0
        self.ready = False

    @property
    def busy(self) -> bool:
        return bool(self.numbers) or not self.ready

    def hear(self, results: list[tuple[Number, Any]]) -> bool:
        """Takes what the worker has said; returns whether that was anything."""
        heard = False
        while (received := self.channel.receive(wait=False)) is not None:
            (kind, *rest), file = received
            heard = True
            if kind == "ready":
                self.ready = True
            elif kind == "at":
                [self.clip] = rest
                self.clips_read += not self.clip
            else:
                number, content = rest
                self.numbers.remove(number)
                result = content if file is None else _unpack(file, content)
                results.append((number, result))
        return heard


def _kill(workers: "list[_Worker]") -> None:
    """Ends workers, stopped or hanging ones too, and empties the list."""
    for worker in workers:
        worker.process.kill()
    while workers:
        worker = workers.pop()
        worker.process.join(KILL_SECONDS)
        worker.channel.close()


def _how_it_ended(code: int) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    if -code in (signal.SIGKILL, signal.SIGBUS):
        how += ", as happens when memory runs out"
    return how


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Defers Ctrl-C and SIGTERM, and blocks them for good in processes started meanwhile.

    A job's signals go to all of its processes, but only the main one acts on them: it stops the
    workers. These inherit the mask, so that no signal can hit them while they still import.
    """
    # Python would start the resource tracker with the first worker, and unblock the signals then.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---------------------------------------------------------------------------------------------
# In a worker

_main: "_Channel | None" = None  # in a worker: to the main process


@contextlib.contextmanager
def reading(clip: str, quarantine: Quarantine) -> Iterator[None]:
    """A context that reads a clip: what hangs or crashes inside is charged to it.

    In the main process, which nobody watches, only the quarantine is heeded.

    Raises DecodeError if the clip is in quarantine.
    """
    if clip in quarantine:
        raise DecodeError(clip, quarantine[clip])
    if _main is None:
        yield
        return
    _main.send(("at", clip))
    try:
        yield
    finally:
        _main.send(("at", ""))


def _work(main: socket.socket) -> None:
    """The life of a worker."""
    global _main
    _end_with_parent()
    stacks.listen()
    cv2.setNumThreads(0)  # the workers themselves are the parallelism
    _main = channel = _Channel(main)
    make: Make
    quarantine: Quarantine
    while (received := channel.receive()) is not None:
        (kind, *rest), file = received
        if kind == "job":
            assert file is not None
            make, quarantine = _unpack(file, *rest)
            channel.send(("ready",))
        elif kind == "skip":
            clip, reason = rest
            quarantine[clip] = reason
        else:
            [number] = rest
            channel.send(*_computed(make, number))


def _computed(make: Make, number: Number) -> tuple[tuple[Any, ...], IO[bytes] | None]:
    """The message with `make(number)`, in a file, or with the exception that it raised."""
    try:
        file, sizes = _pack(make(number))
        return ("made", number, sizes), file
    except Exception as error:
        error.add_note("in a worker:\n" + "".join(traceback.format_exception(error))[-10_000:])
        try:
            sendable = len(pickle.dumps(error)) < MAX_MESSAGE // 2
        except Exception:  # there are exceptions that cannot be pickled
            sendable = False
        return ("made", number, error if sendable else RuntimeError(repr(error)[:1000])), None


def _end_with_parent() -> None:
    """Has this process end when the main process does, even if that is killed."""
    if sys.platform == "linux":  # the kernel ends a process that is stopped or hangs, too
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


# ---------------------------------------------------------------------------------------------
# Between the two


class _Channel:
    """Messages, each of which arrives whole or not at all, and at most one file with each.

    A worker may be killed or stopped at any instruction, and the main process must not wait for
    the other half of a message.
    """

    def __init__(self, own: socket.socket):
        self._socket = own

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: tuple[Any, ...], file: IO[bytes] | None = None) -> None:
        """Sends a message; a peer that is gone is noticed elsewhere."""
        content = pickle.dumps(message)
        assert len(content) <= MAX_MESSAGE
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if file is None:
                self._socket.send(content)
            else:
                socket.send_fds(self._socket, [content], [file.fileno()])

    def receive(self, wait: bool = True) -> Received | None:
        """The next message; None if the peer is gone or, without `wait`, has said nothing."""
        # Not `socket.recv_fds`, which forgets its flags.
        flags = 0 if wait else socket.MSG_DONTWAIT
        files = array.array("i")
        room = socket.CMSG_LEN(files.itemsize)
        try:
            content, ancillary, _, _ = self._socket.recvmsg(MAX_MESSAGE, room, flags)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            # Linux says once that the peer left with messages unread, before what it said last.
            return self.receive(wait)
        for _, _, descriptors in ancillary:
            files.frombytes(descriptors)
        return (pickle.loads(content), files[0] if files else None) if content else None

    def close(self) -> None:
        self._socket.close()


def _pack(value: Any) -> tuple[IO[bytes], Sequence[int]]:
    """A file without a name, in shared memory, with a pickled value and then its arrays.

    Returns it and the bytes of each part. Raises UserError if there is no room.
    """
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(content), *(buffer.raw() for buffer in buffers)]
    folder = SHARED_MEMORY if os.path.isdir(SHARED_MEMORY) else None
    try:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # the last holder frees it
        for part in parts:
            file.write(part)
            file.write(bytes(-part.nbytes % ALIGNMENT))
        file.flush()
    except OSError as error:
        raise UserError(
            f"{folder or tempfile.gettempdir()}: {error.strerror}; enlarge it (docker: --shm-size) "
            "or use fewer workers"
        ) from error
    return file, [part.nbytes for part in parts]


def _unpack(file: int, sizes: Sequence[int]) -> Any:
    """The value that `_pack` put into a file; its arrays lie in the mapped file."""
    whole = memoryview(mmap.mmap(file, 0, access=mmap.ACCESS_COPY))
    os.close(file)
    parts, first = [], 0
    for size in sizes:
        parts.append(whole[first : first + size])
        first += size + -size % ALIGNMENT
    return pickle.loads(parts[0], buffers=parts[1:])
