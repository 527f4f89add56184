"""Zero-shot classification and multiple choice against the official code's numbers."""

import json

import numpy as np
import pytest

from fluxvit_jax.evaluation.retrieval import recall
from fluxvit_jax.evaluation.zero_shot import PROMPTS, class_scores, option_shares, texts_of_classes
from tests.models.golden import GOLDEN

TOLD = json.loads((GOLDEN / "clip/zeroshot_cases.json").read_text())
ARRAYS = np.load(GOLDEN / "clip/zeroshot_cases.npz")


def test_golden_texts():
    assert list(PROMPTS) == TOLD["templates"]
    assert texts_of_classes(TOLD["class_order"]) == TOLD["texts"]


def test_golden_scores_of_classes():
    scores = class_scores(ARRAYS["given.vision"], ARRAYS["given.text"], len(PROMPTS))
    np.testing.assert_allclose(scores, ARRAYS["given.sim_v2t"], rtol=1e-4, atol=1e-6)
    found = recall(scores, [[label] for label in TOLD["labels"]])
    official = TOLD["given"]["top1_plain"], TOLD["given"]["top5_plain"]
    assert (100 * found.recall[1], 100 * found.recall[5]) == pytest.approx(official, abs=0.005)


def test_golden_multiple_choice():
    told = TOLD["multiple_choice"]
    shares = option_shares(ARRAYS["mc.vision"], ARRAYS["mc.text"], told["temp_float32"])
    np.testing.assert_allclose(shares, ARRAYS["mc.scores"], rtol=1e-3, atol=1e-6)
    assert shares.argmax(axis=1).tolist() == told["pred"]
    right = shares.argmax(axis=1) == np.array(told["answers"])
    assert 100 * right.mean() == pytest.approx(told["accuracy_percent"], abs=0.005)
