"""Retrieval against the official code's numbers, and where it leaves ties to the machine."""

import json

import numpy as np
import pytest

from fluxvit_jax.evaluation.retrieval import RECALLS, dual_softmax, ranks, recall, similarities
from tests.models.golden import GOLDEN

CASES = json.loads((GOLDEN / "clip/retrieval_cases.json").read_text())["cases"]
ARRAYS = np.load(GOLDEN / "clip/retrieval_cases.npz")
ROUNDED = "bfloat16"  # its scores have ties that float32 has not
OFFICIAL = {"v2t": "txt", "t2v": "img"}  # the official names


def texts_of(case: dict) -> list[list[int]]:
    """The right texts of each video."""
    return [own if isinstance(own, list) else [own] for own in case["img2txt"]]


def videos_of(case: dict) -> list[list[int]]:
    return [own if isinstance(own, list) else [own] for own in case["txt2img"]]


def scores_of(case: dict) -> dict[str, dict[str, np.ndarray]]:
    videos, texts = (ARRAYS[f"{case['name']}.{kind}"] for kind in ("vision", "text"))
    plain = {"v2t": similarities(videos, texts), "t2v": similarities(texts, videos)}
    return {"plain": plain, "dual_softmax": {k: dual_softmax(x) for k, x in plain.items()}}


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_scores(case):
    name, scores = case["name"], scores_of(case)
    tolerance = 2e-2 if name == ROUNDED else 1e-5
    close(scores["plain"]["v2t"], ARRAYS[f"{name}.sim_v2t"], tolerance)
    for direction in ("v2t", "t2v"):
        expected = ARRAYS[f"{name}.dsl_{direction}"]
        close(scores["dual_softmax"][direction], expected, tolerance)


@pytest.mark.parametrize("kind", ["plain", "dual_softmax"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case["name"] != ROUNDED], ids=lambda case: case["name"]
)
def test_golden_ranks_and_recall(case, kind):
    right = {"v2t": texts_of(case), "t2v": videos_of(case)}
    for direction, scores in scores_of(case)[kind].items():
        expected = case["derived"][kind][direction]
        found = ranks(scores, right[direction])
        if "ranks_best" in expected:
            assert (found >= expected["ranks_best"]).all() and (
                found <= expected["ranks_worst"]
            ).all()
            continue
        assert found.tolist() == expected["ranks"]
        own = recall(scores, right[direction])
        assert (own.median_rank, own.mean_rank) == (
            pytest.approx(expected["median_rank"]),
            pytest.approx(expected["mean_rank"]),
        )
        for k in RECALLS:
            official = case["official"][kind][f"{OFFICIAL[direction]}_r{k}"]
            assert 100 * own.recall[k] == pytest.approx(official, abs=0.005)
            low, high = own.intervals[k]
            assert low <= own.recall[k] <= high and (high - low < 0.35)


def test_equal_scores_are_no_success():
    """A model that gives every pair one score finds nothing, whatever the order of files."""
    scores = np.full((4, 4), 0.5, np.float32)
    own = recall(scores, [[0], [1], [2], [3]])
    assert own.recall[1] == 0 and own.recall[5] == 1 and own.mean_rank == 4
    assert ranks(scores, [[0, 1, 2, 3]] * 4).tolist() == [0] * 4


def test_what_is_no_number_is_found_last():
    """Weights with a NaN gave every query a recall of 100 %."""
    nothing = similarities(*2 * [np.full((4, 8), np.nan, np.float32)])
    assert ranks(nothing, [[0], [1], [2], [3]]).tolist() == [3] * 4
    assert recall(nothing, [[0], [1], [2], [3]]).recall[1] == 0
    one = np.array([[np.nan, 0.2, 0.3], [0.1, np.nan, 0.3]], np.float32)
    assert ranks(one, [[0], [2]]).tolist() == [2, 1]


def test_a_colder_dual_softmax_is_sharper():
    scores = np.array([[0.3, 0.29], [0.1, 0.28]], np.float32)
    assert ranks(scores, [[0], [1]]).tolist() == [0, 0]
    shares = [dual_softmax(scores, t)[0, 1] / scores[0, 1] for t in (1.0, 0.01)]
    np.testing.assert_allclose(shares, [1 / (1 + np.exp(-x)) for x in (0.01, 1.0)], rtol=1e-4)
