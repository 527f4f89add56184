"""Fits the frames of a video to a grid with JAX and NumPy alone, as servers have no OpenCV."""

import jax
import numpy as np

from fluxvit_jax.data.frame_sampling import resized_size, test_crops, test_frames


def fit(video: np.ndarray, T: int, resolution: int) -> np.ndarray:
    """A video as uint8 [B, T, resolution, resolution, 3]; untouched where it is that already."""
    video = np.asarray(video)
    if video.ndim == 4:
        video = video[None]
    if video.ndim != 5 or video.shape[-1] != 3 or 0 in video.shape or video.dtype != np.uint8:
        found = f"{video.dtype} {video.shape}"
        raise ValueError(f"a video is uint8 [T, height, width, 3] or [B, T, ...], not {found}")
    if video.shape[1] != T:
        video = video[:, test_frames(video.shape[1], T)]
    if video.shape[2:4] != (resolution, resolution):
        video = middle_square(video, resolution)
    return video


def middle_square(video: np.ndarray, resolution: int) -> np.ndarray:
    """uint8 [B, T, resolution, resolution, 3]: the short side scaled bilinearly, then cut."""
    height, width = video.shape[2:4]
    height, width = resized_size(height, width, resolution)
    shape = (*video.shape[:2], height, width, 3)
    resized = jax.image.resize(video.astype(np.float32), shape, "linear", antialias=False)
    y, x = test_crops(height, width, 1)[0]
    square = resized[:, :, y : y + resolution, x : x + resolution]
    return np.asarray(square.round().clip(0, 255)).astype(np.uint8)
