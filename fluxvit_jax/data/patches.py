"""Conversion between frames and patches, the form in which clips travel to the device.

In plain NumPy rather than einops: a server of an exported model imports this, and needs JAX and
NumPy only.
"""

import numpy as np

from fluxvit_jax.grids import PATCH, Grid

PATCH_VALUES = PATCH * PATCH * 3  # 588


def patchify(frames: np.ndarray) -> np.ndarray:
    """Cut frames [T, 14 H, 14 W, 3] into patches [T * H * W, 588] of the same dtype.

    Tokens are in (t, h, w) order and the values of a patch in (row, column, channel) order, as the
    official patch embedding flattens them. Raises ValueError when a side is no multiple of 14.
    """
    if frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames must be [T, height, width, 3], not {frames.shape}")
    T, height, width, _ = frames.shape
    if height % PATCH or width % PATCH:
        raise ValueError(f"frames of {height} x {width} px do not divide into patches of {PATCH}")
    H, W = height // PATCH, width // PATCH
    patches = frames.reshape(T, H, PATCH, W, PATCH, 3).swapaxes(2, 3)  # [T, H, W, 14, 14, 3]
    return patches.reshape(T * H * W, PATCH_VALUES)


def unpatchify(patches: np.ndarray, grid: Grid) -> np.ndarray:
    """Put the first `grid.tokens` of patches [P, 588] together: frames [T, 14 H, 14 W, 3].

    Raises ValueError when there are fewer patches than the grid has tokens.
    """
    if patches.ndim != 2 or patches.shape[1] != PATCH_VALUES or len(patches) < grid.tokens:
        raise ValueError(f"{patches.shape} is not at least [{grid.tokens}, {PATCH_VALUES}]")
    T, H, W = grid
    frames = patches[: grid.tokens].reshape(T, H, W, PATCH, PATCH, 3).swapaxes(2, 3)
    return frames.reshape(T, H * PATCH, W * PATCH, 3)


def pad(patches: np.ndarray, capacity: int) -> np.ndarray:
    """Patches [n, 588] padded with zeros: [capacity, 588].

    Raises ValueError when there are more patches than `capacity`.
    """
    if len(patches) > capacity:
        raise ValueError(f"{len(patches)} patches exceed the capacity of {capacity}")
    padded = np.zeros((capacity, patches.shape[1]), patches.dtype)
    padded[: len(patches)] = patches
    return padded
