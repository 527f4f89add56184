"""Zero-shot classification and multiple choice against the official code's numbers."""

import json

import numpy as np
import pytest

from fluxvit_jax.evaluation import zero_shot
from fluxvit_jax.evaluation.average_precision import of_classes
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
    told = told["map"]
    precisions = of_classes(shares, ARRAYS["mc.multi_hot"].astype(bool), np.zeros(6, int))
    np.testing.assert_allclose([own or 0 for own in precisions], told["per_class"], rtol=1e-6)
    assert 100 * np.mean([own or 0 for own in precisions]) == pytest.approx(told["map_percent"])


def test_a_classifier_of_texts_has_the_scores():
    """A product with the mean of a class's unit vectors is the mean of their cosines."""
    rng, temperature = np.random.default_rng(0), 0.07
    texts = (rng.normal(size=(12, 24)) * rng.uniform(0.1, 9, (12, 1))).astype(np.float32)
    head = {
        "norm": {"scale": np.ones(32, np.float32), "bias": np.zeros(32, np.float32)},
        "proj": {
            "kernel": rng.normal(size=(32, 24)).astype(np.float32),
            "bias": np.zeros(24, np.float32),
        },
    }
    pooled = rng.normal(size=(5, 32)).astype(np.float32)
    made = zero_shot.classifier(head, temperature, texts, prompts=3)[zero_shot.CLASSIFIER]
    found = zero_shot.logits(made, pooled, "float32")
    videos = np.asarray(zero_shot.to_text(head, pooled, "float32"))
    expected = class_scores(videos, texts, prompts=3) / temperature
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_golden_end_to_end():
    """Strings and given vectors of videos; the text encoder is the golden state's."""
    texts = ARRAYS["e2e.text_embed"]
    scores = class_scores(ARRAYS["e2e.video_embed"], texts, len(PROMPTS))
    np.testing.assert_allclose(scores, ARRAYS["e2e.sim_v2t"], rtol=1e-4, atol=1e-5)
    found = recall(scores, [[label] for label in TOLD["labels"]])
    official = TOLD["end_to_end"]["official"]["plain"]
    for k in (1, 5, 10):
        assert 100 * found.recall[k] == pytest.approx(official[f"txt_r{k}"], abs=0.005)
