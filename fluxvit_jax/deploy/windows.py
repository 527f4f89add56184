"""Windows of a long video: which frames they have, and their clips."""

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from fluxvit_jax.data import frame_sampling
from fluxvit_jax.data.clips import Clip, middle_square
from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.errors import UserError

MAX_BYTES = 256 << 20  # of the frames that are decoded at once, scaled down


def seconds_of(flag: str, text: str) -> float:
    """The seconds in a flag such as `--window=4s`. Raises UserError."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)s?", text)
    if not match or not 0 < float(match[1]) < math.inf:
        raise UserError(f"--{flag}={text}: is no time above 0 in seconds, such as 4s or 0.5s")
    return float(match[1])


def windows_of(frames: int, rate: float, window: float, stride: float) -> list[range]:
    """The frames of each window of a video: windows of `window` seconds, every `stride` seconds.

    rate: frames per second. The last window ends with the video, so it may begin less than a stride
    after the one before; all have the same length. A video shorter than a window is one window.
    """
    length = min(frames, max(1, round(window * rate)))
    step = max(1.0, stride * rate)
    starts = [round(k * step) for k in range(math.floor((frames - length) / step) + 1)]
    starts = [start for start in starts if start + length <= frames]
    if starts[-1] + length < frames:
        starts.append(frames - length)
    return [range(start, start + length) for start in starts]


def read_windows(
    video: Video, windows: Sequence[range], frames: int, resolution: int
) -> Iterator[Clip | DecodeError]:
    """The clip of each window, `frames` evenly spread over it, or why it cannot be read.

    Windows are decoded many at a time, up to `MAX_BYTES` of pixels: overlapping windows share
    frames, and formats that can only be decoded from the start are not for every window.
    """
    height, width = video.size
    if min(height, width) > resolution:
        height, width = frame_sampling.resized_size(height, width, resolution)
    at_once = max(1, MAX_BYTES // (3 * height * width * frames))
    for first in range(0, len(windows), at_once):
        yield from _read(video, windows[first : first + at_once], frames, resolution)


def _read(
    video: Video, windows: Sequence[range], frames: int, resolution: int
) -> list[Clip | DecodeError]:
    numbers = [window.start + frame_sampling.test_frames(len(window), frames) for window in windows]
    needed = np.unique(np.concatenate(numbers))
    try:
        pixels = video.read(needed, short_side=resolution)
    except DecodeError as error:
        if len(windows) == 1:
            return [error]
        half = len(windows) // 2
        parts = windows[:half], windows[half:]
        return [clip for part in parts for clip in _read(video, part, frames, resolution)]
    pixels = middle_square(pixels, resolution)
    return [
        Clip(pixels[np.searchsorted(needed, own)], own, own / video.frame_rate) for own in numbers
    ]
