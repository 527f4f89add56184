"""A time limit for reads in the main process, where no worker can be replaced."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from fluxvit_jax.data.decoding import DecodeError

T = TypeVar("T")

POLL_SECONDS = 0.1


def within(seconds: float, name: str, read: Callable[[], T]) -> T:
    """`read()`, in a thread of its own: one that hangs can only be left behind.

    seconds: of waiting, without the time that this process is suspended; 0: no limit.

    Raises DecodeError, of the video `name`, when the time is over; else as `read`.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(read())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    waited = 0.0
    while thread.is_alive() and (not seconds or waited < seconds):
        thread.join(POLL_SECONDS)
        waited += POLL_SECONDS
    if not future.done():
        raise DecodeError(name, f"hangs: not read within {seconds:g} s")
    return future.result()
