"""How sure an accuracy is: 95 % intervals over videos."""

import numpy as np
from scipy.stats import binomtest

LEVEL = 0.95
RESAMPLES = 10_000

Interval = tuple[float, float]


def share_interval(right: int, videos: int) -> Interval:
    """Wilson's interval of a share, such as the videos that are classified right."""
    low, high = binomtest(right, videos).proportion_ci(LEVEL, method="wilson")
    return float(low), float(high)


def paired_difference(one: np.ndarray, other: np.ndarray) -> tuple[float, Interval]:
    """The mean of one - other over the same videos, and its bootstrap interval over videos.

    one, other: bool [n], which videos are right. Resampling videos is resampling how often each of
    the differences -1, 0 and 1 occurs, so that is what is drawn; the draws are always the same.

    Raises ValueError where there are no videos or not as many of each.
    """
    if one.shape != other.shape or not len(one):
        raise ValueError(f"{one.shape} and {other.shape} are not the same videos")
    differences = one.astype(int) - other.astype(int)
    counts = np.array([(differences == value).sum() for value in (-1, 0, 1)])
    draws = np.random.default_rng(0).multinomial(len(one), counts / len(one), RESAMPLES)
    low, high = np.quantile(
        (draws[:, 2] - draws[:, 0]) / len(one), [0.5 - LEVEL / 2, 0.5 + LEVEL / 2]
    )
    return float(differences.mean()), (float(low), float(high))
