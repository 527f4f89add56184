"""Frame indices of a clip within a video, and the crops of its spatial views.

Both are those of the official code (kinetics_sparse_o4a.py); only the source of randomness differs,
so that a clip depends on nothing but the seed and its own number.
"""

import numpy as np


def train_frames(num_video_frames: int, T: int, rng: np.random.Generator) -> np.ndarray:
    """One random frame from each of T equal segments of a video: int64 [T], not descending.

    Both ends of a segment belong to it, as in the official code, so a frame may come twice.
    """
    starts = _segment_starts(num_video_frames, T, T + 1)
    return rng.integers(starts[:-1], starts[1:], endpoint=True)


def test_frames(num_video_frames: int, T: int, clip: int = 0, clips: int = 1) -> np.ndarray:
    """Frames of temporal view `clip` of `clips`: int64 [T], evenly spread, not descending.

    The defaults are the middle of each segment, which is the official validation mode.
    """
    if not 0 <= clip < clips:
        raise ValueError(f"there is no clip {clip} of {clips}")
    segment = (num_video_frames - 1) / T
    offset = int(segment / (clips + 1) * (clip + 1))
    starts = _segment_starts(num_video_frames, T, T)
    return np.minimum(starts + offset, num_video_frames - 1)


def middle_frames(num_video_frames: int, T: int) -> np.ndarray:
    """The middle frame of each of T equal segments: int64 [T], not descending.

    A video of fewer frames gives all of them, and the last one again and again. Source:
    InternVideo2, multi_modality, dataset/video_utils.py (get_frame_indices, "middle").
    """
    segments = min(T, num_video_frames)
    borders = np.linspace(0, num_video_frames, segments + 1).astype(np.int64)
    middles = (borders[:-1] + borders[1:] - 1) // 2
    return np.pad(middles, (0, T - segments), mode="edge")


def resized_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) after scaling the shorter side to `short_side`; the longer rounds down."""
    if width < height:
        return int(short_side * height / width), short_side
    return short_side, int(short_side * width / height)


def test_crops(height: int, width: int, crops: int) -> list[tuple[int, int]]:
    """Corners (y, x) of `crops` squares spread along the longer side; one crop is the middle.

    The squares are as large as the shorter side: height and width are those of `resized_size`.
    """
    room = abs(height - width)
    steps = [room / 2] if crops == 1 else [i * (room / (crops - 1)) for i in range(crops)]
    return [(int(step), 0) if height >= width else (0, int(step)) for step in steps]


def center_crop(height: int, width: int, size: int) -> tuple[int, int]:
    """Corner (y, x) of the middle square of `size`, as in the official validation mode.

    Halves are rounded to even, where `test_crops` rounds down.
    """
    return round((height - size) / 2), round((width - size) / 2)


def _segment_starts(num_video_frames: int, T: int, count: int) -> np.ndarray:
    """The first `count` borders, int64 [count], of T equal segments of a video."""
    if num_video_frames < 1 or T < 1:
        raise ValueError(f"cannot take {T} frames of a video of {num_video_frames}")
    return np.round((num_video_frames - 1) / T * np.arange(count)).astype(np.int64)
