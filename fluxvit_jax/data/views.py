"""The test views of a video, temporal clips x spatial crops: any number of grids, one decode."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fluxvit_jax.budgets import PATCH, Grid
from fluxvit_jax.data.augment import crop_view, resize_clip
from fluxvit_jax.data.decode import Video
from fluxvit_jax.data.patches import patchify
from fluxvit_jax.data.sampling import resized_size, test_crops, test_frames


class Frames(NamedTuple):
    """Decoded frames of a video of `length` frames.

    pixels: uint8 [n, height, width, 3]; numbers: int64 [n], which of its frames they are, rising.
    """

    pixels: np.ndarray
    numbers: np.ndarray
    length: int


def read_frames(
    video: Video, grids: Sequence[Grid], clips: int, most_bytes: int, short_side: int | None = None
) -> Frames | None:
    """All frames that `clips` temporal clips on each of `grids` need; None if that is too much.

    most_bytes: of the pixels at their own size; without short_side only. short_side: larger frames
        are scaled down to it on the way.

    Raises DecodeError.
    """
    wanted = np.unique(
        np.concatenate([_frames_of_clips(len(video), grid, clips).ravel() for grid in grids])
    )
    if short_side is None:
        first = video.read(wanted[:1])
        if len(wanted) * first.nbytes > most_bytes:
            return None
    return Frames(video.read(wanted, short_side), wanted, len(video))


def cut_views(frames: Frames, grid: Grid, clips: int, crops: int) -> np.ndarray:
    """The views on one grid, clip by clip, as patches: uint8 [clips * crops, T * H * W, 588].

    The same pixels, whatever other grids the frames were read for.
    """
    size = grid.rows * PATCH
    numbers, places = np.unique(_frames_of_clips(frames.length, grid, clips), return_inverse=True)
    own = frames.pixels[np.searchsorted(frames.numbers, numbers)]
    own = resize_clip(own, *resized_size(*own.shape[1:3], size))
    return np.stack(
        [
            patchify(crop_view(own[clip], size, y, x))
            for clip in places.reshape(clips, grid.frames)
            for y, x in test_crops(*own.shape[1:3], crops)
        ]
    )


def _frames_of_clips(length: int, grid: Grid, clips: int) -> np.ndarray:
    """The frames of each temporal clip: int64 [clips, T]."""
    return np.stack([test_frames(length, grid.frames, clip, clips) for clip in range(clips)])
