"""Test views of a video, temporal clips x spatial crops, on any number of grids from one decode."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from ml_collections import ConfigDict

from fluxvit_jax.data.augmentation import crop_view, resize_clip
from fluxvit_jax.data.decoding import Video
from fluxvit_jax.data.frame_sampling import (
    middle_frames,
    resized_size,
    test_crops,
    test_frames,
)
from fluxvit_jax.data.patches import patchify
from fluxvit_jax.grids import PATCH, Grid


class Frames(NamedTuple):
    """Decoded frames of a video of `length` frames.

    pixels: uint8 [n, height, width, 3]; numbers: int64 [n], their frame numbers, ascending.
    """

    pixels: np.ndarray
    numbers: np.ndarray
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """The views that a video is evaluated on: clips x crops of each grid.

    frames: "spread", as the code of fine-tuning takes them, or "middle" of equal segments, as that
        of InternVideo2 CLIP does. squeeze: the whole frame becomes the square, without a crop and
        whatever its shape, as there. seconds: only the beginning of a video counts; 0: all of it.
    """

    clips: int = 1
    crops: int = 1
    frames: str = "spread"
    squeeze: bool = False
    seconds: float = 0.0

    def __str__(self) -> str:
        """Such as "4x3", clips x crops, and what else is not the default."""
        more = ["middle frames"] * (self.frames == "middle") + ["squeezed"] * self.squeeze
        more += [f"first {self.seconds:g} s"] * bool(self.seconds)
        return ", ".join([f"{self.clips}x{self.crops}", *more])

    def length(self, video: Video) -> int:
        """Frames of a video that count."""
        if not self.seconds:
            return len(video)
        return max(1, min(len(video), int(self.seconds * (video.frame_rate or 0)) or len(video)))

    @property
    def count(self) -> int:
        """Views of a video."""
        return self.clips * self.crops

    @property
    def order(self) -> list[tuple[int, int]]:
        """Clip and crop of each view, from the middle out: first the middle crop of all clips."""

        def from_middle(view: tuple[int, int]) -> tuple[float, float]:
            clip, crop = view
            return abs(crop - (self.crops - 1) / 2), abs(clip - (self.clips - 1) / 2)

        return sorted(itertools.product(range(self.clips), range(self.crops)), key=from_middle)

    @property
    def counts(self) -> list[int]:
        """After how many views, in `order`, a cascade may stop: 1, those of one crop, all."""
        return sorted({1, self.clips, self.count})

    def numbers(self, length: int, grid: Grid) -> np.ndarray:
        """The frame numbers of each clip in `length` frames: int64 [clips, T]."""
        if self.frames == "middle":
            return middle_frames(length, grid.frames)[None]
        clips = range(self.clips)
        return np.stack([test_frames(length, grid.frames, clip, self.clips) for clip in clips])


def views_of(config: ConfigDict) -> Views:
    """The views that `config.eval` describes."""
    own = config.eval
    return Views(
        clips=own.clips,
        crops=own.crops,
        frames=own.frames,
        squeeze=own.resize == "squeeze",
        seconds=own.seconds,
    )


def read_frames(
    video: Video,
    grids: Sequence[Grid],
    views: Views,
    most_bytes: int,
    short_side: int | None = None,
) -> Frames | None:
    """All frames that the views on each of `grids` need; None if they are too large.

    most_bytes: limit of the pixels at full size; ignored with short_side. short_side: larger frames
        are scaled down to it while they are decoded.

    Raises DecodeError.
    """
    length = views.length(video)
    numbers = np.unique(np.concatenate([views.numbers(length, grid).ravel() for grid in grids]))
    if short_side is None:
        first = video.read(numbers[:1])
        if len(numbers) * first.nbytes > most_bytes:
            return None
    return Frames(video.read(numbers, short_side), numbers, length)


def cut_views(frames: Frames, grid: Grid, views: Views) -> np.ndarray:
    """The views on one grid, in `Views.order`, as patches: uint8 [clips * crops, T * H * W, 588].

    The pixels do not depend on the other grids that the frames were read for.
    """
    size = grid.rows * PATCH
    numbers, index = np.unique(views.numbers(frames.length, grid), return_inverse=True)
    pixels = frames.pixels[np.searchsorted(frames.numbers, numbers)]
    clips = index.reshape(-1, grid.frames)
    if views.squeeze:
        # Official: bicubic without antialiasing, of the pinned torchvision.
        squeezed = resize_clip(pixels, size, size, cv2.INTER_CUBIC)
        return np.stack([patchify(squeezed[clip]) for clip in clips])
    _, full_height, full_width, _ = pixels.shape
    height, width = resized_size(full_height, full_width, size)
    pixels = resize_clip(pixels, height, width)
    corners = test_crops(height, width, views.crops)
    return np.stack(
        [
            patchify(crop_view(pixels[clips[clip]], size, *corners[crop]))
            for clip, crop in views.order
        ]
    )
