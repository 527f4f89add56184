"""Test views of a video, temporal clips x spatial crops, on any number of grids from one decode."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fluxvit_jax.data.augmentation import crop_view, resize_clip
from fluxvit_jax.data.decoding import Video
from fluxvit_jax.data.frame_sampling import resized_size, test_crops, test_frames
from fluxvit_jax.data.patches import patchify
from fluxvit_jax.grids import PATCH, Grid


class Frames(NamedTuple):
    """Decoded frames of a video of `length` frames.

    pixels: uint8 [n, height, width, 3]; numbers: int64 [n], their frame numbers, ascending.
    """

    pixels: np.ndarray
    numbers: np.ndarray
    length: int


def read_frames(
    video: Video, grids: Sequence[Grid], clips: int, most_bytes: int, short_side: int | None = None
) -> Frames | None:
    """All frames that `clips` temporal clips on each of `grids` need; None if they are too large.

    most_bytes: limit of the pixels at full size; ignored with short_side. short_side: larger frames
        are scaled down to it while they are decoded.

    Raises DecodeError.
    """
    numbers = np.unique(
        np.concatenate([_frames_of_clips(len(video), grid, clips).ravel() for grid in grids])
    )
    if short_side is None:
        first = video.read(numbers[:1])
        if len(numbers) * first.nbytes > most_bytes:
            return None
    return Frames(video.read(numbers, short_side), numbers, len(video))


def cut_views(frames: Frames, grid: Grid, clips: int, crops: int) -> np.ndarray:
    """The views on one grid, clip by clip, as patches: uint8 [clips * crops, T * H * W, 588].

    The pixels do not depend on the other grids that the frames were read for.
    """
    size = grid.rows * PATCH
    numbers, index = np.unique(_frames_of_clips(frames.length, grid, clips), return_inverse=True)
    pixels = frames.pixels[np.searchsorted(frames.numbers, numbers)]
    _, full_height, full_width, _ = pixels.shape
    height, width = resized_size(full_height, full_width, size)
    pixels = resize_clip(pixels, height, width)
    return np.stack(
        [
            patchify(crop_view(pixels[clip], size, y, x))
            for clip in index.reshape(clips, grid.frames)
            for y, x in test_crops(height, width, crops)
        ]
    )


def _frames_of_clips(length: int, grid: Grid, clips: int) -> np.ndarray:
    """The frame numbers of each temporal clip: int64 [clips, T]."""
    return np.stack([test_frames(length, grid.frames, clip, clips) for clip in range(clips)])
