"""Ctrl-C and SIGTERM that end the program at once, even while it compiles.

Python calls a signal's handler when the main thread runs Python code again, which a compiler puts
off for minutes. The wakeup descriptor has the signal's number at once, and a thread reads it.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NO_DESCRIPTOR = -1

_contexts = 0  # of `ended_by_signals` that are open


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """A context of the main thread in which a signal ends the program, see `exit_by`."""
    global _contexts
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_exit_on_signal, args=[reader], daemon=True)
    thread.start()
    _contexts += 1
    try:
        with handled_by(_leave_it_to_the_thread, writer):
            yield
    finally:
        _contexts -= 1
        os.close(writer)
        thread.join()


def ended_by_signals_again() -> contextlib.AbstractContextManager[None]:
    """The same within another one, where handlers were replaced; else no change.

    Nobody's notebook is to end because it trains.
    """
    return ended_by_signals() if _contexts else contextlib.nullcontext()


@contextlib.contextmanager
def handled_by(
    handler: Callable[[int, FrameType | None], None], descriptor: int = NO_DESCRIPTOR
) -> Iterator[None]:
    """A context of the main thread with another handler and wakeup descriptor."""
    handlers = {number: signal.signal(number, handler) for number in SIGNALS}
    before = signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler_before in handlers.items():
            signal.signal(number, handler_before)


def exit_by(number: int) -> None:
    """Ends the process with status 128 + a signal's number.

    Nothing is unwound, since exceptions might be caught.
    """
    with contextlib.suppress(OSError):  # stderr may be closed
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


def _exit_on_signal(reader: int) -> None:
    """Runs until the other end of the pipe is closed, and closes this one."""
    while byte := os.read(reader, 1):
        if byte[0] in SIGNALS:  # others that have handlers are written as well
            exit_by(byte[0])
    os.close(reader)


def _leave_it_to_the_thread(number: int, _: FrameType | None) -> None:
    """Without a handler in Python, nothing would be written to the wakeup descriptor."""


# A signal of a forked child would be written to the pipe, which it shares, and end its parent.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(NO_DESCRIPTOR))
