"""Frame indices and crops against the official code."""

import json
from pathlib import Path

import numpy as np
import pytest

from fluxvit_jax.data import frame_sampling

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "optim_case.json").read_text())


def test_frames_of_test_and_validation():
    for case in GOLDEN["frame_index"]:
        views = (case["clip_idx"], case["test_num_segment"]) if case["mode"] == "test" else (0, 1)
        frames = frame_sampling.test_frames(case["video_size"], case["num_frames"], *views)
        assert frames.dtype == np.int64
        assert frames.tolist() == case["index"]


def test_frames_of_training_fill_the_official_ranges():
    for case in GOLDEN["frame_index_train"]["cases"]:
        rng = np.random.default_rng(0)
        draws = np.stack(
            [
                frame_sampling.train_frames(case["video_size"], case["num_frames"], rng)
                for _ in range(400)
            ]
        )
        assert draws.dtype == np.int64
        ranges = np.stack([draws.min(0), draws.max(0)], axis=1)
        assert ranges.tolist() == case["inclusive_ranges"]
        assert ranges.max() <= case["max_index"]


def test_crops_of_test():
    for case in GOLDEN["test_crops"]:
        height, width = frame_sampling.resized_size(case["H"], case["W"], case["short_side"])
        assert [height, width] == case["resized"]
        corners = frame_sampling.test_crops(height, width, case["test_num_crop"])
        assert corners == [(crop["y"], crop["x"]) for crop in case["crops"]]


def test_crop_of_validation():
    for case in GOLDEN["validation_center_crop"]:
        height, width = frame_sampling.resized_size(case["H"], case["W"], case["short_side"])
        assert [height, width] == case["resized"]
        assert frame_sampling.center_crop(height, width, case["crop"]) == (case["y"], case["x"])


def test_impossible_frames_are_refused():
    with pytest.raises(ValueError, match="video of 0"):
        frame_sampling.train_frames(0, 8, np.random.default_rng(0))
    with pytest.raises(ValueError, match="no clip 4 of 4"):
        frame_sampling.test_frames(10, 8, 4, 4)


CLIP = json.loads((Path(__file__).parents[1] / "golden/clip/frames_cases.json").read_text())[
    "frames"
]


def test_the_middle_frames_of_the_official_retrieval():
    for case in CLIP:
        frames = frame_sampling.middle_frames(case["vlen"], case["num_frames"])
        assert frames.tolist() == case["middle"]


def test_training_draws_every_frame_of_a_segment():
    """The official code for retrieval never draws the last one, nor any other of two."""
    case = next(case for case in CLIP if (case["num_frames"], case["vlen"]) == (4, 8))
    assert case["rand"] == [0, 2, 4, 6]
    rng = np.random.default_rng(0)
    drawn = np.stack([frame_sampling.train_frames(8, 4, rng) for _ in range(100)])
    assert set(drawn.ravel()) == set(range(8))
