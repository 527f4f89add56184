"""Cascades: rules of confidence at values computed by hand, and files of them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fluxvit_jax.adaptive import cascade as cascades
from fluxvit_jax.adaptive.cascade import Cascade, Step, confidence
from fluxvit_jax.errors import UserError
from fluxvit_jax.models.fluxvit import FluxViTConfig

SURE, SPLIT = [0.8, 0.1, 0.1], [0.5, 0.25, 0.25]
SMALL = {"budget": 32, "frames": 4, "resolution": 56, "head": 2, "threshold": 0.7}
LARGE = {"budget": 128, "frames": 8, "resolution": 56, "head": 0}


def test_confidences():
    average = np.array([SURE, SPLIT])
    assert confidence("probability", average, average, None).tolist() == [0.8, 0.5]
    np.testing.assert_allclose(confidence("margin", average, average, None), [0.7, 0.25])
    # Entropy of one half and two quarters: 1.5 bits of log2(3).
    found = confidence("entropy", average, average, None)
    assert found[1] == pytest.approx(1 - 1.5 / np.log2(3))
    before = np.array([[0.1, 0.8, 0.1], [0.6, 0.4, 0.0]])
    assert confidence("agreement", average, average, before).tolist() == [0, 0.5]
    assert confidence("agreement", average, average, None).tolist() == [0.8, 0.5]
    certain = np.array([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(confidence("entropy", certain, certain, None), [1, 0], atol=1e-12)
    for kind in cascades.CONFIDENCES:  # one class is certain
        assert confidence(kind, np.ones((2, 1)), np.ones((2, 1)), None).tolist() == [1, 1]


def test_only_videos_in_doubt_are_asked_again():
    asked = []

    def ask(number: int, videos: np.ndarray) -> np.ndarray:
        asked.append((number, videos.tolist()))
        return np.array([[SURE, SPLIT, SURE], [SURE, SURE[::-1], SURE]][number])[videos]

    steps = (Step(**SMALL), Step(**LARGE, weight=0.5))
    answers = Cascade(steps).run(3, ask)
    assert asked == [(0, [0, 1, 2]), (1, [1])]
    assert answers.step.tolist() == [0, 1, 0]
    np.testing.assert_allclose(answers.probabilities, [SURE, [0.3, 0.175, 0.525], SURE])
    scores = np.exp(answers.logits)
    np.testing.assert_allclose(scores / scores.sum(axis=1, keepdims=True), answers.probabilities)


def test_one_step_is_that_cell_bit_for_bit():
    probabilities = np.random.default_rng(0).random((5, 4)).astype(np.float32)
    answers = Cascade((Step(**LARGE),)).run(5, lambda _, videos: probabilities[videos])
    assert answers.probabilities.tobytes() == probabilities.tobytes()
    assert not answers.step.any()


def test_files(tmp_path):
    steps = (Step(**SMALL, temperature=1.3, views=1), Step(**LARGE, weight=0.5, cell="a"))
    path = tmp_path / "cascade.json"
    cascades.write(Cascade(steps, "entropy"), path)
    assert cascades.read(path) == Cascade(steps, "entropy")
    path.write_text(json.dumps({"steps": [SMALL, LARGE]}))
    assert cascades.read(path) == Cascade((Step(**SMALL), Step(**LARGE)))
    assert str(cascades.read(path)) == (
        "32 tokens (4 x 56 px), on below probability 0.7; then 128 tokens (8 x 56 px)"
    )


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [LARGE | {"threshold": 0.5}, SMALL | {"threshold": None}],
            "out of order: step 2",
        ),
        ([SMALL | {"threshold": None}, LARGE], "step 1: lacks a threshold"),
        ([SMALL, LARGE | {"threshold": 0.5}], "step 2: is the last"),
        ([SMALL, SMALL | {"threshold": None}], "step 2 is the one before again"),
        ([{"budget": 3}], "step 1: lacks 'frames'"),
        ([SMALL, LARGE | {"tokens": 3}], "step 2: has no field 'tokens'"),
        ([SMALL, LARGE | {"head": -1}], "step 2: head is a number of at least 0"),
        ([SMALL, LARGE | {"resolution": 60}], "step 2: resolution is a multiple of the patch size"),
        ([SMALL, LARGE | {"resolution": 10}], "patch size 14, not 10"),
        ([SMALL, LARGE | {"weight": 2.0}], "step 2: weight is above 0 and at most 1"),
        ([SMALL, LARGE | {"frames": "8"}], "step 2: frames is a number"),
        ([SMALL, 7], "step 2: is no object"),
        ([], "has no steps"),
        ("none", "is no cascade"),
    ],
)
def test_bad_cascades_are_said_in_a_line(steps, message):
    with pytest.raises(UserError, match=r"^given: ") as caught:
        cascades.from_json({"steps": steps}, "given")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "network", "message"),
    [
        ({"head": 3}, {}, "the network has no head 3"),
        ({"head": -1}, {}, "the network has no head -1"),
        ({"resolution": 50}, {}, "50 px is no multiple of 14"),
        ({"budget": 1}, {"cls": "inside"}, "a budget of 1 tokens leaves no patch"),
        ({}, {"selector": "none"}, "selects nothing, and 128 patches are too many for 127"),
    ],
)
def test_steps_that_a_network_cannot_run(changes, network, message):
    first, last = Step(**SMALL), Step(**LARGE | {"budget": 127})
    model = FluxViTConfig(64, 2, 2, frames=8, rows=4, columns=4, classes=10)
    cascades.check_steps([first, last], model, "given")
    steps = [replace(first, budget=65), replace(last, **changes)]
    with pytest.raises(UserError, match=f"^given: step 2: .*{message}$"):
        cascades.check_steps(steps, replace(model, **network), "given")


def test_bad_files_are_said_in_a_line(tmp_path):
    for content in ("", "[1]", '{"confidence": "luck", "steps": []}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match=r"bad\.json: "):
            cascades.read(tmp_path / "bad.json")
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        cascades.read(tmp_path / "none.json")
