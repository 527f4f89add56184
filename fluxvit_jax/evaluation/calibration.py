"""Calibration of probabilities: how far to trust them, and the temperature that corrects them.

A network is calibrated if, among predictions of 80 % confidence, 80 % are right. Temperature
scaling ("On calibration of modern neural networks", 2017) divides log probabilities by one number
T: T > 1 makes an overconfident network less sure, and no T changes which class is the likeliest.
Probabilities may be means over views, as evaluation and prediction give them. NumPy only, so that a
server of an exported model can import this.

Videos may be spread over hosts: each passes its own to the functions, and in `total` a function
that sums arrays over the hosts. All hosts then call together, and get the same.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

BINS = 15  # as in that paper
LOWEST, HIGHEST = 0.05, 20.0  # temperatures that are searched
BISECTIONS = 20  # T to a relative precision of 2e-6
FLOOR = float(np.finfo(np.float32).tiny)  # of a probability: softmax in float32 reaches 0 below it
ROWS = 2048  # computed at once: few enough for the processor's cache

Total = Callable[[np.ndarray], np.ndarray]


def one_host(values: np.ndarray) -> np.ndarray:
    """The `total` of a host that has all videos."""
    return values


def at_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(log probabilities / temperature) over the last axis.

    probabilities: float [..., C]; those below `FLOOR` count as `FLOOR`. Returns the same shape and
    dtype; at temperature 1 the very array that was given.

    Raises ValueError: the temperature is not positive and finite.
    """
    if not 0 < temperature < np.inf:
        raise ValueError(f"{temperature} is no temperature: it is positive and finite")
    if temperature == 1:
        return probabilities
    powers = np.exp(_log(probabilities) / temperature)
    return (powers / powers.sum(-1, keepdims=True)).astype(probabilities.dtype)


def fit_temperature(
    probabilities: np.ndarray, labels: np.ndarray, total: Total = one_host
) -> float:
    """The temperature in [LOWEST, HIGHEST] that minimizes the mean cross-entropy.

    The cross-entropy is convex in 1/T, so bisection of its slope finds the minimum. Where all
    videos are classified correctly that is at LOWEST, or would be below it. 1 where every
    temperature is as good, as without videos.

    probabilities: float [n, C]; labels: int [n]; total: see the module.
    """
    log = _log(probabilities)
    of_label = log[np.arange(len(labels)), labels].sum()

    def slope(inverse: float) -> float:
        """Derivative of the summed cross-entropy by 1/T, at 1/T = inverse."""
        expected = 0.0
        for start in range(0, len(log), ROWS):
            part = log[start : start + ROWS]
            powers = np.exp(part * inverse)
            expected += ((powers * part).sum(-1) / powers.sum(-1)).sum()
        return float(total(np.array(expected - of_label)))

    start = slope(1.0)
    if start == 0:
        return 1.0
    low, high = (1.0, 1 / LOWEST) if start < 0 else (1 / HIGHEST, 1.0)
    if start < 0 and slope(high) <= 0:
        return LOWEST
    if start > 0 and slope(low) >= 0:
        return HIGHEST
    for _ in range(BISECTIONS):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(1 / np.sqrt(low * high))


def first_half(labels: np.ndarray) -> np.ndarray:
    """Whether each video is in the first half for `cross_fitted`: bool [n].

    Videos of a class alternate, so that both halves have the same classes in any order of videos.

    labels: int [n], of the videos of all hosts.
    """
    first = np.zeros(len(labels), bool)
    first[np.argsort(labels, kind="stable")[::2]] = True
    return first


def cross_fitted(
    probabilities: np.ndarray,
    labels: np.ndarray,
    first: np.ndarray | None = None,
    total: Total = one_host,
) -> np.ndarray:
    """Probabilities [n, C] of each half of the videos, at the temperature of the other half.

    Calibration of these is not flattered: no temperature was fitted to the videos it is applied to.

    probabilities: float [n, C]; labels: int [n]; first: bool [n], this host's part of `first_half`,
    needed with several hosts; total: see the module.
    """
    first = first_half(labels) if first is None else first
    scaled = np.empty_like(probabilities)
    for own in (first, ~first):
        temperature = fit_temperature(probabilities[~own], labels[~own], total)
        scaled[own] = at_temperature(probabilities[own], temperature)
    return scaled


def reliability(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS, total: Total = one_host
) -> dict[str, Any]:
    """Accuracy against confidence, which is the probability of the likeliest class.

    probabilities: float [n, C]; labels: int [n]; bins: number of bins of equal width, each with its
    upper end; total: see the module.

    Returns {"ece", "bins": {"count", "confidence", "accuracy"}}, ready for JSON: the expected
    calibration error, the mean of |accuracy - confidence| of the bins weighted by their shares of
    the videos (0 without videos); and of each bin its videos, their mean confidence and their
    accuracy, None in an empty bin.
    """
    confidence = probabilities.max(-1).astype(np.float64)
    right = probabilities.argmax(-1) == labels
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    columns = (np.ones(len(labels)), confidence, right)
    videos, sure, correct = total(
        np.stack([np.bincount(bin_of, column, minlength=bins) for column in columns])
    )
    counted = {
        "count": [int(n) for n in videos],
        "confidence": _means(sure, videos),
        "accuracy": _means(correct, videos),
    }
    return {"ece": float(np.abs(correct - sure).sum() / max(1, videos.sum())), "bins": counted}


def measure(
    probabilities: np.ndarray,
    labels: np.ndarray,
    first: np.ndarray | None = None,
    total: Total = one_host,
) -> dict[str, Any]:
    """What a report says of a budget: {"ece", "temperature", "ece_at_temperature", "bins"}.

    "ece" and "bins" as of `reliability`; "temperature": fitted to all videos; "ece_at_temperature":
    of `cross_fitted` probabilities. Arguments as there.
    """
    plain = reliability(probabilities, labels, total=total)
    scaled = cross_fitted(probabilities, labels, first, total)
    return {
        "ece": plain["ece"],
        "temperature": fit_temperature(probabilities, labels, total),
        "ece_at_temperature": reliability(scaled, labels, total=total)["ece"],
        "bins": plain["bins"],
    }


def _means(sums: np.ndarray, videos: np.ndarray) -> list[float | None]:
    return [float(own / n) if n else None for own, n in zip(sums, videos, strict=True)]


def _log(probabilities: np.ndarray) -> np.ndarray:
    """Logarithms, finite for probability 0; that of the likeliest class is 0."""
    log = np.log(np.maximum(probabilities.astype(np.float64), FLOOR))
    return log - log.max(-1, keepdims=True)
