"""Intervals that hold what they say."""

import numpy as np
import pytest

from fluxvit_jax.reports.confidence_intervals import (
    mean_interval,
    paired_difference,
    share_interval,
)


@pytest.mark.parametrize(
    ("right", "videos", "low", "high"),
    # Wilson's formula by hand, z = 1.959964.
    [(0, 10, 0.0, 0.277533), (5, 10, 0.236593, 0.763407), (90, 100, 0.825634, 0.944771)],
)
def test_wilson(right, videos, low, high):
    assert share_interval(right, videos) == pytest.approx((low, high), abs=1e-5)


def test_paired_bootstrap_is_that_of_resampled_videos():
    rng = np.random.default_rng(3)
    one, other = rng.random((2, 300)) < [[0.8], [0.7]]
    mean, (low, high) = paired_difference(one, other)
    differences = one.astype(int) - other.astype(int)
    picks = rng.integers(300, size=(10_000, 300))
    expected = np.quantile(differences[picks].mean(axis=1), [0.025, 0.975])
    assert mean == pytest.approx(differences.mean())
    np.testing.assert_allclose((low, high), expected, atol=0.006)
    assert paired_difference(one, other) == (mean, (low, high))  # no draw differs


def test_pairing_narrows_the_interval():
    """Two classifiers that are right on nearly the same videos."""
    rng = np.random.default_rng(0)
    one = rng.random(400) < 0.6
    other = one.copy()
    other[:4] = False
    paired = np.ptp(paired_difference(one, other)[1])
    assert paired < np.ptp(paired_difference(one, rng.permutation(other))[1]) / 3


def test_intervals_cover_nineteen_times_of_twenty():
    rng = np.random.default_rng(1)
    gap = np.mean([0.75 - 0.7])
    covered = []
    for _ in range(400):
        draws = rng.random(200)
        one, other = draws < 0.75, np.where(rng.random(200) < 0.5, draws, rng.random(200)) < 0.7
        _, (low, high) = paired_difference(one, other)
        covered.append(low <= gap <= high)
    assert 0.91 < np.mean(covered) < 0.98


def test_what_are_not_the_same_videos_is_refused():
    for sizes in ((3, 4), (0, 0)):
        with pytest.raises(ValueError, match="not the same videos"):
            paired_difference(*(np.zeros(size, bool) for size in sizes))


def test_a_mean_is_bootstrapped_by_groups():
    """Values of a group are drawn together: equal ones count as one."""
    rng = np.random.default_rng(1)
    own = rng.random(80)
    values, groups = np.repeat(own, 5), np.repeat(np.arange(80), 5)
    expected = np.quantile(own[rng.integers(80, size=(10_000, 80))].mean(axis=1), [0.025, 0.975])
    np.testing.assert_allclose(mean_interval(values, groups), expected, atol=0.006)
    np.testing.assert_allclose(mean_interval(own), expected, atol=0.006)
    assert np.ptp(mean_interval(values)) < 0.6 * np.ptp(expected)
    with pytest.raises(ValueError, match="no values"):
        mean_interval(np.zeros(0))
