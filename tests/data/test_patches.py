"""Patch order, the way back, and padding."""

import numpy as np
import pytest

from fluxvit_jax.data import patches
from fluxvit_jax.grids import Grid


def random_frames(T: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (T, height, width, 3), np.uint8)


def test_order_of_tokens_and_values():
    frames = random_frames(3, 28, 42)
    cut = patches.patchify(frames)
    assert cut.shape == (3 * 2 * 3, 588)
    assert cut.dtype == np.uint8
    for t in range(3):
        for h in range(2):
            for w in range(3):
                patch = frames[t, 14 * h : 14 * (h + 1), 14 * w : 14 * (w + 1)]
                np.testing.assert_array_equal(cut[(t * 2 + h) * 3 + w], patch.ravel())


def test_the_way_back_ignores_padding():
    frames = random_frames(2, 28, 56)
    padded = patches.pad(patches.patchify(frames), 20)
    assert padded.shape == (20, 588)
    assert not padded[16:].any()
    np.testing.assert_array_equal(patches.unpatchify(padded, Grid(2, 2, 4)), frames)


def test_a_view_with_strides_is_cut_like_its_copy():
    flipped = random_frames(2, 28, 28)[:, :, ::-1]
    np.testing.assert_array_equal(
        patches.patchify(flipped), patches.patchify(np.ascontiguousarray(flipped))
    )


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="29 x 28 px"):
        patches.patchify(random_frames(1, 29, 28))
    with pytest.raises(ValueError, match="must be"):
        patches.patchify(random_frames(1, 28, 28)[0])
    with pytest.raises(ValueError, match="capacity of 3"):
        patches.pad(np.zeros((4, 588), np.uint8), 3)
    with pytest.raises(ValueError, match="at least"):
        patches.unpatchify(np.zeros((7, 588), np.uint8), Grid(2, 2, 2))
