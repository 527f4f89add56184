"""Retrieval between videos and texts: similarities, ranks and recall.

Plain scores are cosines. Dual softmax multiplies each with the share that a softmax over all
queries gives it; it needs all of them at once and presumes one right query for each item. The
official code (InternVideo2, multi_modality, tasks_clip/retrieval_utils.py) reports both, at
temperature 1 whatever the model has learned, and the published numbers are of dual softmax.

Everything is float32. In bfloat16, as in the official scripts, many scores are equal by rounding,
and recall depends on the order in which a sort leaves them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fluxvit_jax.reports.confidence_intervals import Interval, mean_interval

RECALLS = (1, 5, 10)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """What a direction of retrieval comes to.

    recall: share of queries whose right item is among the first K, by K; intervals: 95 %, of that,
    over groups of queries; median_rank, mean_rank: of the best right item, from 1.
    """

    queries: int
    gallery: int
    recall: dict[int, float]
    intervals: dict[int, Interval]
    median_rank: float
    mean_rank: float


def similarities(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Cosines of vectors [Q, D] and [G, D]: float32 [Q, G]."""
    return unit(queries) @ unit(gallery).T


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of unit length, float32; zeros stay zeros."""
    x = x.astype(np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def softmax(scores: np.ndarray, axis: int) -> np.ndarray:
    """The softmax of scores along an axis: scipy's, without the time that its import takes."""
    shares = np.exp(scores - scores.max(axis, keepdims=True))
    return shares / shares.sum(axis, keepdims=True)


def dual_softmax(scores: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Scores [Q, G] times their softmax over the queries: each item prefers its own queries."""
    return scores * dual_weights(scores, temperature)


def dual_weights(scores: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """The softmax of scores [Q, G] over the queries, 0 for queries whose scores are -inf."""
    return softmax(scores / np.float32(temperature), axis=0)


def ranks(scores: np.ndarray, right: Sequence[Sequence[int]]) -> np.ndarray:
    """Rank of the best right item of each query, from 0: int [Q].

    A wrong item with exactly its score comes before it, so that equal scores never look right, and
    so does every one that cannot be compared: NaN is found last.

    scores: [Q, G]; right: items of each query, at least one.
    """
    found = np.empty(len(scores), int)
    for query, items in enumerate(right):
        own = list(items)
        at_least = ~(scores[query] < scores[query, own].max())
        at_least[own] = False
        found[query] = at_least.sum()
    return found


def recall(
    scores: np.ndarray, right: Sequence[Sequence[int]], groups: np.ndarray | None = None
) -> Recall:
    """Recall of scores [Q, G].

    right: as in `ranks`; groups: int [Q] from 0, of queries that belong together, such as the video
    of a caption; by default each query is a group.
    """
    found = ranks(scores, right)
    hits = {k: found < k for k in RECALLS}
    return Recall(
        queries=scores.shape[0],
        gallery=scores.shape[1],
        recall={k: float(hit.mean()) for k, hit in hits.items()},
        intervals={k: mean_interval(hit, groups) for k, hit in hits.items()},
        median_rank=float(np.median(found) + 1),
        mean_rank=float(found.mean() + 1),
    )
