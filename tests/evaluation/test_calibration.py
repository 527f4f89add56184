"""Calibration: small cases by hand, and the temperature against a scan of all of them."""

import json
import subprocess
import sys

import numpy as np
import pytest

from fluxvit_jax.evaluation import calibration
from fluxvit_jax.evaluation.calibration import (
    HIGHEST,
    LOWEST,
    at_temperature,
    cross_fitted,
    first_half,
    fit_temperature,
    reliability,
)


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def sample(sharpness: float, n: int = 600, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from softmax(x), and the probabilities softmax(sharpness * x) in float32."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, classes)) * 2
    labels = np.array([rng.choice(classes, p=own) for own in softmax(x)])
    return softmax(sharpness * x).astype(np.float32), labels


def test_at_temperature_by_hand():
    probabilities = np.array([[[0.8, 0.2], [0.5, 0.5]]])
    assert at_temperature(probabilities, 0.5) == pytest.approx(
        np.array([[[16 / 17, 1 / 17], [0.5, 0.5]]])
    )
    assert at_temperature(probabilities, 2.0) == pytest.approx(
        np.array([[[2 / 3, 1 / 3], [0.5, 0.5]]])
    )
    assert at_temperature(probabilities, 1) is probabilities


def test_at_temperature_of_zeros():
    certain = np.array([[1, 0, 0], [0, 0, 0]], np.float32)
    for temperature in (LOWEST, 0.7, HIGHEST):
        scaled = at_temperature(certain, temperature)
        assert scaled.dtype == np.float32 and np.isfinite(scaled).all()
        assert scaled.sum(-1) == pytest.approx(1, abs=1e-6)
        assert scaled[0].argmax() == 0 and scaled[1] == pytest.approx(1 / 3)


@pytest.mark.parametrize("temperature", [0, -1, np.inf, np.nan])
def test_no_temperature(temperature):
    with pytest.raises(ValueError, match="is no temperature"):
        at_temperature(np.array([0.5, 0.5]), temperature)


def test_the_temperature_by_hand():
    """Three of four are right at 0.9 each: best is 0.75, where 9 ** (1 / T) is 3."""
    probabilities = np.array([[0.9, 0.1]] * 4)
    labels = np.array([0, 0, 0, 1])
    assert fit_temperature(probabilities, labels) == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 2.5])
def test_the_temperature_is_the_best_of_all(sharpness):
    probabilities, labels = sample(sharpness)
    scan = np.geomspace(LOWEST, HIGHEST, 4001)
    losses = [
        -np.log(at_temperature(probabilities.astype(float), t)[range(len(labels)), labels]).mean()
        for t in scan
    ]
    best = scan[np.argmin(losses)]
    assert fit_temperature(probabilities, labels) == pytest.approx(best, rel=0.002)
    assert best == pytest.approx(sharpness, rel=0.1)


def test_temperatures_at_the_bounds_and_of_nothing():
    certain, labels = np.eye(3, dtype=np.float32), np.arange(3)
    assert fit_temperature(certain, labels) == LOWEST
    assert fit_temperature(certain, (labels + 1) % 3) == HIGHEST
    assert fit_temperature(np.full((3, 3), 1 / 3), labels) == 1
    assert fit_temperature(np.zeros((0, 3)), np.zeros(0, int)) == 1


def test_reliability_by_hand():
    """Bins of a quarter: 0.7 and 0.75 (its upper end) are in the third, 0.9 and 1 in the last."""
    confidence = np.array([0.7, 0.75, 0.9, 1.0])
    found = reliability(np.stack([confidence, 1 - confidence], -1), np.array([1, 0, 0, 0]), bins=4)
    assert found["bins"]["count"] == [0, 0, 2, 2]
    assert found["bins"]["confidence"] == [None, None, pytest.approx(0.725), 0.95]
    assert found["bins"]["accuracy"] == [None, None, 0.5, 1.0]
    assert found["ece"] == pytest.approx(0.5 * 0.225 + 0.5 * 0.05)
    assert json.loads(json.dumps(found)) == found


def test_reliability_of_nothing():
    found = reliability(np.zeros((0, 3)), np.zeros(0, int))
    assert found["ece"] == 0 and found["bins"]["count"] == [0] * calibration.BINS


def test_halves_have_the_same_classes_in_any_order():
    for labels in ([0, 1, 0, 1, 0, 1, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1]):
        first = first_half(np.array(labels))
        assert np.bincount(np.array(labels)[first]).tolist() == [2, 2]


def test_each_half_has_the_temperature_of_the_other():
    """Three of four and four of five are right at 0.9: 9 ** (1 / T) is 3, and 4 of the others."""
    probabilities = np.array([[0.9, 0.1]] * 9)
    labels = np.array([0, 0, 0, 1, 0, 0, 0, 0, 1])
    first = np.arange(9) < 4
    scaled = cross_fitted(probabilities, labels, first)[:, 0]
    assert scaled == pytest.approx([0.8] * 4 + [0.75] * 5, rel=1e-5)


def test_a_temperature_calibrates_what_it_was_not_fitted_to():
    probabilities, labels = sample(2.5, 4000)
    found = calibration.measure(probabilities, labels)
    assert found["temperature"] == pytest.approx(2.5, rel=0.05)
    assert found["ece"] > 0.1 and found["ece_at_temperature"] < 0.03
    assert found["ece"] == reliability(probabilities, labels)["ece"]


def test_hosts_find_together_what_one_finds():
    """A host's share of the sums is added by `total`, here of a host that has one video of 600."""
    probabilities, labels = sample(2.5)
    first, own = first_half(labels), np.arange(600) == 7
    sums: list[np.ndarray] = []

    def recorded(values: np.ndarray) -> np.ndarray:
        sums.append(values)
        return values

    alone = calibration.measure(probabilities, labels, first, recorded)
    answers = iter(sums)
    shared = calibration.measure(
        probabilities[own], labels[own], first[own], lambda values: next(answers)
    )
    assert shared == alone and next(answers, None) is None


def test_no_jax():
    """Servers of exported models need none for it."""
    code = "import sys, fluxvit_jax.evaluation.calibration; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
