"""Average precision of classes that are told apart independently, and its mean (mAP)."""

from collections.abc import Sequence

import numpy as np


def average_precision(scores: np.ndarray, positive: np.ndarray, missed: int = 0) -> float:
    """The average precision of a class, as scikit-learn defines it.

    The sum over thresholds, the distinct scores, of the precision times the gain in recall; videos
    of equal scores come together.

    Args:
        scores: [n] of the videos; positive: bool [n], which of them are of the class.
        missed: further videos of the class, which no threshold finds.
    """
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(positive[order])
    # The last video of each score.
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, len(scores) > 0))
    precision, recall = found[last] / (last + 1), found[last] / (positive.sum() + missed)
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def of_classes(
    scores: np.ndarray, positive: np.ndarray, missed: Sequence[int] | np.ndarray
) -> list[float | None]:
    """The average precision of each class; None for one without videos.

    scores, positive: [n, C]; missed: [C], videos that could not be read, which count as not found.
    """
    return [
        average_precision(own, is_own, int(lost)) if is_own.any() or lost else None
        for own, is_own, lost in zip(scores.T, positive.T, missed, strict=True)
    ]


def mean(precisions: Sequence[float | None]) -> float:
    """The mean over the classes that have videos: macro mAP. There must be one."""
    return float(np.mean([own for own in precisions if own is not None]))
