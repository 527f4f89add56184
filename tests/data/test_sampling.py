"""Frame indices and crops against the official code, and the independence of random streams."""

import json
from pathlib import Path

import numpy as np
import pytest

from fluxvit_jax.budgets import square_grids
from fluxvit_jax.data import sampling

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "optim_case.json").read_text())


def test_frames_of_test_and_validation():
    for case in GOLDEN["frame_index"]:
        views = (case["clip_idx"], case["test_num_segment"]) if case["mode"] == "test" else (0, 1)
        frames = sampling.test_frames(case["video_size"], case["num_frames"], *views)
        assert frames.dtype == np.int64
        assert frames.tolist() == case["index"]


def test_frames_of_training_fill_the_official_ranges():
    for case in GOLDEN["frame_index_train"]["cases"]:
        rng = np.random.default_rng(0)
        draws = np.stack(
            [sampling.train_frames(case["video_size"], case["num_frames"], rng) for _ in range(400)]
        )
        assert draws.dtype == np.int64
        ranges = np.stack([draws.min(0), draws.max(0)], axis=1)
        assert ranges.tolist() == case["inclusive_ranges"]
        assert ranges.max() <= case["max_index"]


def test_crops_of_test():
    for case in GOLDEN["test_crops"]:
        height, width = sampling.resized_size(case["H"], case["W"], case["short_side"])
        assert [height, width] == case["resized"]
        corners = sampling.test_crops(height, width, case["test_num_crop"])
        assert corners == [(crop["y"], crop["x"]) for crop in case["crops"]]


def test_crop_of_validation():
    for case in GOLDEN["validation_center_crop"]:
        height, width = sampling.resized_size(case["H"], case["W"], case["short_side"])
        assert [height, width] == case["resized"]
        assert sampling.center_crop(height, width, case["crop"]) == (case["y"], case["x"])


def test_impossible_frames_are_refused():
    with pytest.raises(ValueError, match="video of 0"):
        sampling.train_frames(0, 8, np.random.default_rng(0))
    with pytest.raises(ValueError, match="no clip 4 of 4"):
        sampling.test_frames(10, 8, 4, 4)


def test_grids_are_drawn_uniformly_by_group_alone():
    grids = square_grids(range(6, 26, 2), range(112, 364, 28), 2048, 6144)
    drawn = [sampling.grid_of_group(grids, 3, group) for group in range(41 * 60)]
    assert drawn[17] == sampling.grid_of_group(grids, 3, 17)
    counts = np.array([drawn.count(grid) for grid in grids])
    # Chi squared over 40 degrees of freedom; 80 is past the 99.98th percentile.
    assert ((counts - 60) ** 2 / 60).sum() < 80
    assert drawn[:100] != [sampling.grid_of_group(grids, 4, group) for group in range(100)]


def test_streams_differ_by_seed_index_and_kind():
    keys = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), (1, 1, 1), (0, 2**40, 1)]
    draws = {tuple(sampling.stream_rng(*key).integers(2**63, size=4)) for key in keys}
    assert len(draws) == len(keys)
