"""One clip of a video file, as a network is asked about it: evenly spread frames."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fluxvit_jax.data import frame_sampling
from fluxvit_jax.data.augmentation import crop_view, resize_clip
from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.errors import UserError

# Frames of one video that are kept at their own size; one of more is decoded for each clip.
MAX_DECODED_BYTES = 1 << 30


class Clip(NamedTuple):
    """What the network sees of a video.

    frames: uint8 [T, resolution, resolution, 3]; numbers: int [T], which frames of the video they
    are; times: float [T], seconds, at the video's mean frame rate (0 where it names none).
    """

    frames: np.ndarray
    numbers: np.ndarray
    times: np.ndarray


def read_clip(video: Video, frames: int, resolution: int) -> Clip:
    """Evenly spread frames, the short side scaled to `resolution`, the middle square.

    Raises DecodeError for a video that cannot be read.
    """
    (clip,) = read_clips(video, [(frames, resolution)])
    return clip


def read_clips(video: Video, sizes: Sequence[tuple[int, int]]) -> list[Clip]:
    """The clip of each (frames, resolution), as `read_clip` reads it, from one decode.

    Raises DecodeError for a video that cannot be read.
    """
    wanted = [frame_sampling.test_frames(len(video), frames) for frames, _ in sizes]
    numbers, rate = np.unique(np.concatenate(wanted)), video.frame_rate
    if len(sizes) > 1 and len(numbers) * video.read(numbers[:1]).nbytes > MAX_DECODED_BYTES:
        return [read_clip(video, *size) for size in sizes]
    pixels, clips = video.read(numbers), []
    for own, (_, resolution) in zip(wanted, sizes, strict=True):
        square = middle_square(pixels[np.searchsorted(numbers, own)], resolution)
        clips.append(Clip(square, own, own / rate if rate else np.zeros(len(own))))
    return clips


def middle_square(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """Frames uint8 [T, h, w, 3], scaled by the short side and cut to squares of `resolution`."""
    _, height, width, _ = pixels.shape
    size = frame_sampling.resized_size(height, width, resolution)
    corner = frame_sampling.test_crops(*size, 1)[0]
    return crop_view(resize_clip(pixels, *size), resolution, *corner)


def read_video(path: str | os.PathLike, frames: int = 16) -> np.ndarray:
    """Frames of a video file at full size, evenly spread over it: uint8 [T, height, width, 3].

    They are the frames that evaluation takes for one temporal clip. Of a video with fewer frames
    some come more than once.

    Raises:
        UserError: the file is missing, or no video that can be read.
        ValueError: `frames` is less than 1.
    """
    if frames < 1:
        raise ValueError(f"frames is 1 or more, not {frames}")
    try:
        with Video(path) as video:
            return video.read(frame_sampling.test_frames(len(video), frames))
    except DecodeError as error:
        raise UserError(str(error)) from error
