"""Balance of unequally frequent classes: weights for the loss, and an order of videos."""

import dataclasses
from functools import cached_property

import numpy as np

from fluxvit_jax.data.random_streams import CLASS_STREAM, VIDEO_STREAM, stream_rng
from fluxvit_jax.data.sources import Source
from fluxvit_jax.errors import UserError


def source_labels(source: Source, field: str) -> np.ndarray:
    """The labels of all videos, int64 [n].

    field: of the config, which needs them. Raises UserError if only reading every video would tell.
    """
    if source.labels is None:
        raise UserError(
            f"config.{field}: balanced needs the labels of all videos beforehand, which prepared "
            "folders and mixtures do not list; train from a list or class folders"
        )
    return np.asarray(source.labels, np.int64)


def balanced_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """A weight for each class, float64 [classes]; the mean over the videos is 1.

    It is scikit-learn's "balanced": videos / (classes with videos * videos of the class). Classes
    without videos have 1.
    """
    counts = np.bincount(labels, minlength=classes)
    weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return np.where(counts, weights, 1.0)


def describe_balance(labels: np.ndarray, classes: int) -> str:
    """The fewest and the most videos of a class that has any, and how many have none, in words."""
    counts = np.bincount(labels, minlength=classes)
    present = np.flatnonzero(counts)
    least, most = present[np.argmin(counts[present])], np.argmax(counts)
    text = f"videos by class: {counts[least]} (class {least}) to {counts[most]} (class {most})"
    absent = classes - len(present)
    return text + (f", none in {absent} of {classes} classes" if absent else "")


@dataclasses.dataclass(frozen=True)
class BalancedOrder:
    """The endless drawing order that shows all classes equally often: position -> video.

    Each run of as many draws as there are classes with videos holds each of them once, in a random
    order. Each class runs through random permutations of its videos. A draw depends on the seed and
    its position only.

    labels: int64 [n].
    """

    labels: np.ndarray
    seed: int

    @cached_property
    def _videos(self) -> list[np.ndarray]:
        """The numbers of the videos of each class that has any."""
        return [np.flatnonzero(self.labels == label) for label in np.unique(self.labels)]

    def __getitem__(self, position: int) -> int:
        classes = len(self._videos)
        turn, place = divmod(int(position), classes)
        order = stream_rng(self.seed, turn, CLASS_STREAM).permutation(classes)
        number = int(order[place])
        videos = self._videos[number]
        # Every turn draws one video of the class, so `turn` counts them.
        epoch, place = divmod(turn, len(videos))
        rng = stream_rng(self.seed, epoch * classes + number, VIDEO_STREAM)
        return int(videos[rng.permutation(len(videos))[place]])
