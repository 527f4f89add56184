"""Measures of an evaluation: top-1, top-5, mAP, loss and calibration."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fluxvit_jax.data.multi_label import label_array
from fluxvit_jax.distributed.mesh import host_index, sum_over_hosts
from fluxvit_jax.evaluation import average_precision, calibration
from fluxvit_jax.evaluation.results import TOP

DIGITS = 6  # of the stored probabilities


def cross_entropy(probabilities: np.ndarray, labels: np.ndarray) -> list[float]:
    """The loss of each row of [b, classes], without label smoothing; finite for probability 0."""
    own = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
    return [float(loss) for loss in -np.log(np.maximum(own, np.finfo(np.float32).tiny))]


def binary_cross_entropy(probabilities: np.ndarray, labels: np.ndarray) -> list[float]:
    """The loss of each row of [b, classes], averaged over the classes, of multi-hot labels."""
    probabilities = probabilities.astype(np.float64)
    own = np.where(labels, probabilities, 1 - probabilities)
    losses = -np.log(np.maximum(own, np.finfo(np.float32).tiny)).mean(axis=1)
    return [float(loss) for loss in losses]


def likeliest(probabilities: np.ndarray) -> list[list[tuple[int, float]]]:
    """The `TOP` classes of each row, (class, probability), likeliest first."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
    return [
        [(int(c), round(float(row[c]), DIGITS)) for c in classes]
        for row, classes in zip(probabilities, order, strict=True)
    ]


def top_accuracies(classes: int, videos: Sequence[dict], k: int) -> dict[str, Any]:
    """Top-1 and top-5 of the k-th setting; a video that could not be read counts as wrong.

    So does one whose probabilities are NaN.
    """
    read = [video for video in videos if not video["failure"]]
    pairs = [
        (video["label"], [c for c, share in video["top"][k] if not np.isnan(share)])
        for video in read
    ]
    return {
        "top1": sum(label in top[:1] for label, top in pairs) / len(videos),
        "top5": sum(label in top for label, top in pairs) / len(videos),
    }


def mean_average_precision(classes: int, videos: Sequence[dict], k: int) -> dict[str, Any]:
    """mAP and the average precision of each class; a video that could not be read is not found."""
    read = [video for video in videos if not video["failure"]]
    positive = multi_hot(read, classes)
    missed = multi_hot(videos, classes).sum(axis=0) - positive.sum(axis=0)
    scores = np.nan_to_num([video["probabilities"][k] for video in read])  # NaN: found last
    precisions = average_precision.of_classes(scores, positive, missed)
    return {"map": average_precision.mean(precisions), "ap": precisions}


class Kept(NamedTuple):
    """Probabilities of the videos that this host has read.

    numbers: of the videos of each batch, int [b]; probabilities: of each setting and batch, float32
    [b, classes].
    """

    numbers: list[np.ndarray]
    probabilities: list[list[np.ndarray]]

    def add(self, batch: dict[str, np.ndarray], found: Sequence[np.ndarray]) -> None:
        """Adds a batch. found: the probabilities of its rows for each setting."""
        read = (batch["video"] >= 0) & (batch["failure"] == "")
        self.numbers.append(batch["video"][read])
        for own, rows in zip(self.probabilities, found, strict=True):
            own.append(rows[read])


def calibrations(kept: Kept, videos: Sequence[dict]) -> list[dict[str, Any]]:
    """What `calibration.measure` finds at each setting. All hosts call it.

    The hosts tell each other sums alone: the probabilities of a large data set are many.

    videos: of all hosts. Of hosts that have read the same video only its "host" counts it.
    """
    read = [video for video in videos if not video["failure"]]
    labels = np.array([video["label"] for video in read])
    first = calibration.first_half(labels)
    own = np.flatnonzero([video["host"] == host_index() for video in read])
    row_of = {int(number): row for row, number in enumerate(np.concatenate(kept.numbers))}
    rows = np.array([row_of[read[i]["number"]] for i in own], np.int64)
    return [
        calibration.measure(np.concatenate(parts)[rows], labels[own], first[own], sum_over_hosts)
        for parts in kept.probabilities
    ]


def multi_hot(videos: Sequence[dict], classes: int) -> np.ndarray:
    """Which classes each video has: bool [n, classes]."""
    return label_array([tuple(video["label"]) for video in videos], classes).astype(bool)
