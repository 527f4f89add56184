"""Average precision by hand, with ties, and against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from fluxvit_jax.evaluation.average_precision import average_precision, mean, of_classes


@pytest.mark.parametrize(
    ("scores", "positive", "missed", "expected"),
    [
        # Found at the ranks 1, 3 and 4 of 5.
        ([0.9, 0.8, 0.7, 0.6, 0.1], [1, 0, 1, 1, 0], 0, (1 + 2 / 3 + 3 / 4) / 3),
        # Of three that are equal, two are found at once, at the rank of the last.
        ([0.9, 0.5, 0.5, 0.5, 0.1], [1, 1, 0, 1, 0], 0, 1 / 3 + 2 / 3 * 3 / 4),
        ([0.5, 0.5, 0.5, 0.5], [0, 1, 0, 0], 0, 1 / 4),
        ([0.2, 0.1], [1, 1], 0, 1),
        # Two more were not read: half of all are found, the last at the end.
        ([0.9, 0.8, 0.7], [1, 0, 1], 2, (1 + 2 / 3) / 4),
        ([0.9, 0.8], [0, 0], 1, 0),
    ],
)
def test_by_hand(scores, positive, missed, expected):
    found = average_precision(np.array(scores), np.array(positive, bool), missed)
    assert found == pytest.approx(expected)


def test_as_scikit_learn_with_ties():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 8, (60, 5)) / 8
    positive = rng.random((60, 5)) < 0.3
    positive[:, 2] = False  # a class without videos
    precisions = of_classes(scores, positive, [0] * 5)
    assert precisions[2] is None
    kept = [0, 1, 3, 4]
    expected = average_precision_score(positive[:, kept], scores[:, kept], average=None)
    np.testing.assert_allclose([precisions[i] for i in kept], expected)
    assert mean(precisions) == pytest.approx(expected.mean())
