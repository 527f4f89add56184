"""Readers of videos that fail by their names. Alone in their file, so that workers load it soon."""

import os
import signal
import time

from fluxvit_jax.data.decoding import DecodeError, Video

KILLED = "was killed by SIGKILL, as happens when memory runs out"
REASONS = {
    "1.mp4": "hangs: not read within 1 s",
    "4.mp4": "crashes its reader, which was killed by SIGSEGV",
    "6.mp4": "hangs: not read within 1 s",
    "9.mp4": f"its reader {KILLED}, twice at this clip",
}


def open_fatal(path: str) -> Video:
    """What decoders, systems and people do to a worker, by the name of the video."""
    match os.path.basename(path):
        case "1.mp4":
            time.sleep(1000)
        case "4.mp4":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "6.mp4":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "9.mp4":
            os.kill(os.getpid(), signal.SIGKILL)
    return Video(path)


def open_bad(path: str) -> Video:
    """The same videos are bad in the ordinary way."""
    if reason := REASONS.get(os.path.basename(path)):
        raise DecodeError(path, reason)
    return Video(path)


def open_killing(path: str) -> Video:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
