"""Arrays of labels: one a video, or any number as multi-hot rows (`train.multi_label`)."""

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from fluxvit_jax.data.sources import Label, labels_of


def multi_hot_classes(config: ConfigDict) -> int:
    """The number of classes of multi-hot labels; 0 where videos have one label."""
    return config.model.classes if config.train.multi_label else 0


def label_array(labels: Sequence[Label], multi_hot: int = 0) -> np.ndarray:
    """The labels of n videos: int32 [n].

    multi_hot: number of classes, if labels are several: the array is then uint8 [n, classes], with
        1 for each class of a video, else 0.
    """
    if not multi_hot:
        return np.array(labels, np.int32)
    rows = np.zeros((len(labels), multi_hot), np.uint8)
    for row, label in zip(rows, labels, strict=True):
        row[list(labels_of(label))] = 1
    return rows
