"""Confidence intervals (95 %) of accuracies over videos."""

import math
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000

Interval = tuple[float, float]


def share_interval(right: int, videos: int) -> Interval:
    """Wilson interval of a share, such as that of the correctly classified videos.

    Not by scipy.stats: its import would be a fifth of the time in which a program starts.
    """
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    middle = right + z**2 / 2
    half = z * math.sqrt(right * (videos - right) / videos + z**2 / 4)
    low, high = ((middle + side) / (videos + z**2) for side in (-half, half))
    return max(low, 0.0), min(high, 1.0)


def mean_interval(values: np.ndarray, groups: np.ndarray | None = None) -> Interval:
    """Bootstrap interval of a mean of values [n]; the seed is fixed.

    groups: int [n] from 0; values of a group, such as captions of a video, are drawn together, as
    they are not independent. By default each is a group.

    Raises ValueError: no values.
    """
    if not len(values):
        raise ValueError("no values")
    groups = np.arange(len(values)) if groups is None else groups
    sums, sizes = np.bincount(groups, values), np.bincount(groups)
    rng, means = np.random.default_rng(0), []
    for _ in range(RESAMPLES // 100):  # in parts, which fit into memory
        drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), 100)
        means.append(drawn @ sums / (drawn @ sizes))
    return _middle(np.concatenate(means))


def paired_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, Interval]:
    """The mean of a - b over the same videos, and its bootstrap interval over videos.

    a, b: bool [n], which videos are classified correctly. Resampling videos amounts to resampling
    the counts of the differences -1, 0 and 1, so those are drawn; the seed is fixed.

    Raises ValueError: no videos, or different numbers of them.
    """
    if a.shape != b.shape or not len(a):
        raise ValueError(f"{a.shape} and {b.shape} are not the same videos")
    differences = a.astype(int) - b.astype(int)
    counts = np.array([(differences == value).sum() for value in (-1, 0, 1)])
    draws = np.random.default_rng(0).multinomial(len(a), counts / len(a), RESAMPLES)
    return float(differences.mean()), _middle((draws[:, 2] - draws[:, 0]) / len(a))


def _middle(draws: np.ndarray) -> Interval:
    """The middle `LEVEL` of numbers."""
    low, high = np.quantile(draws, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)
