"""A reader of videos that fails by their names. Alone in its file, so that workers load it soon."""

import os
import signal
import time

from fluxvit_jax.data.decoding import Video


def open_badly(path: str) -> Video:
    """Crashes the process on a.mp4, and hangs on b.mp4; killed.mp4 takes all memory."""
    match os.path.basename(path):
        case "a.mp4":
            os.abort()
        case "b.mp4":
            time.sleep(60)
        case "killed.mp4":
            os.kill(os.getpid(), signal.SIGKILL)
    return Video(path)
