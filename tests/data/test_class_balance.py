"""Weights of classes against scikit-learn's formula; the order in which balanced sampling draws."""

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from fluxvit_jax.data.class_balance import (
    BalancedOrder,
    balanced_weights,
    describe_balance,
    source_labels,
)
from fluxvit_jax.data.mixture import Mixture, Part
from fluxvit_jax.data.sources import Example, FileSource, training_part
from fluxvit_jax.errors import UserError

LABELS = np.array([0] * 7 + [3] * 2 + [1] * 3)  # none of class 2
CLASSES = 4


def test_weights_are_those_of_scikit_learn():
    weights = balanced_weights(LABELS, CLASSES)
    expected = compute_class_weight("balanced", classes=np.unique(LABELS), y=LABELS)
    np.testing.assert_allclose(weights[[0, 1, 3]], expected)
    assert weights[2] == 1
    assert weights[LABELS].mean() == pytest.approx(1)
    assert describe_balance(LABELS, CLASSES) == (
        "videos by class: 2 (class 3) to 7 (class 0), none in 1 of 4 classes"
    )


def test_every_class_is_drawn_equally_often():
    order = BalancedOrder(LABELS, seed=5)
    videos = np.array([order[position] for position in range(3 * 42)])
    turns = LABELS[videos].reshape(-1, 3)
    assert (np.sort(turns) == [0, 1, 3]).all()  # each run of three has each class once
    assert len(np.unique(turns, axis=0)) == 6  # in all orders
    for label, often in ((0, 6), (1, 14), (3, 21)):  # 42 draws of 7, 3 and 2 videos
        own = videos[LABELS[videos] == label]
        counts = np.bincount(own, minlength=len(LABELS))[label == LABELS]
        assert (counts == often).all()
        epochs = own.reshape(often, -1)
        assert (np.sort(epochs) == np.flatnonzero(label == LABELS)).all()
        assert len(np.unique(epochs, axis=0)) > 1


def test_a_draw_depends_on_seed_and_position_only():
    one, same, other = (BalancedOrder(LABELS, seed) for seed in (0, 0, 1))
    last = [same[position] for position in reversed(range(60))][::-1]
    assert [one[position] for position in range(60)] == last
    assert [other[position] for position in range(60)] != last


def test_labels_of_a_source():
    source = FileSource([Example(f"{n}.mp4", int(k), f"/{n}.mp4") for n, k in enumerate(LABELS)])
    np.testing.assert_array_equal(source_labels(source, "data.sampling"), LABELS)
    part = training_part(source, 0.5)
    expected = [part[number].label for number in range(len(part))]
    np.testing.assert_array_equal(source_labels(part, "data.sampling"), expected)
    mixture = Mixture((Part(name="a", source=source),))
    with pytest.raises(UserError, match="balanced needs the labels of all videos"):
        source_labels(mixture, "data.sampling")
