"""A reader of videos that fails by their names. Alone in its file, so that workers load it soon."""

import os
import time

from fluxvit_jax.data.decoding import Video


def open_badly(path: str) -> Video:
    """Crashes the process on a.mp4, and hangs on b.mp4."""
    match os.path.basename(path):
        case "a.mp4":
            os.abort()
        case "b.mp4":
            time.sleep(60)
    return Video(path)
