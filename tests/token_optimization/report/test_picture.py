"""The picture for slides."""

import cv2
import numpy as np
import pytest

from fluxvit_jax.token_optimization import report
from fluxvit_jax.token_optimization.report.style import LIGHT
from tests.token_optimization.report.sample import FRAMES, NASTY, sample


@pytest.mark.parametrize("frames", [FRAMES, tuple(range(2, 62, 2))])
def test_the_picture_is_light_and_shows_all_methods(tmp_path, frames):
    report.write(sample(budgets=(1024,), frames=frames, nasty=NASTY), tmp_path)
    picture = cv2.imread(str(tmp_path / "report.png"))[..., ::-1].astype(int)
    assert picture.shape[1] > 1200
    assert picture[[0, 0, -1, -1], [0, -1, 0, -1]].min() == 255
    for name in ("accent", "plain", "merge"):
        colour = [int(LIGHT[name][i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(picture - colour).max(-1) <= 2).sum() > 50
