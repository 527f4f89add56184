"""Streams of random numbers on the host: every draw depends on a seed, a stream and a number only.

The Philox counter separates the streams: the draws for group 7 and for sample 7 of one seed have
nothing in common.
"""

import numpy as np

GRID_STREAM = 0  # the grid of a group of clips
SAMPLE_STREAM = 1  # frames and augmentation of a sample
REPLACEMENT_STREAM = 2  # the videos tried in place of one that cannot be read
HOLDOUT_STREAM = 3  # the videos held out of a training list
CLASS_STREAM = 4  # the order of the classes in balanced sampling
VIDEO_STREAM = 5  # the order of the videos of a class in balanced sampling
CAPTION_STREAM = 6  # the caption of a sample, of a video that has several


def stream_rng(seed: int, index: int, stream: int = SAMPLE_STREAM) -> np.random.Generator:
    """The random numbers of item `index` (>= 0) of `stream` under `seed` (>= 0)."""
    key = np.array([seed, index], np.uint64)
    counter = np.array([0, 0, 0, stream], np.uint64)  # the last word is the most significant
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
