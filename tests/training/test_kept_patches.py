"""Pictures of kept patches: as many pixels in color as the budget keeps."""

import numpy as np
import pytest

from fluxvit_jax.data.annotations import open_source
from fluxvit_jax.distributed.mesh import make_mesh
from fluxvit_jax.training.kept_patches import GAP, SIDE, KeptPatches
from tests import tiny
from tests.evaluation.test_evaluate import random_params
from tests.training.test_metrics import events


def test_kept_patches_are_in_color_and_others_gray(tiny_data, compiled):
    """Four clips of the tinted videos, of which one cannot be read."""
    config = tiny.make_config(tiny_data)
    source = open_source(f"{tiny_data}/validation.csv", tiny_data, tiny.CLASSES)
    kept = KeptPatches(config, source, make_mesh(config), {})
    pictures = kept.pictures(random_params(config))
    assert list(pictures) == ["kept_24", "kept_12"]
    for name, frames, share in (("kept_24", 6, 24 / 54), ("kept_12", 4, 12 / 16)):
        picture = pictures[name]
        assert picture.shape == (3 * (SIDE + GAP), frames * (SIDE + GAP), 3)
        colored = np.ptp(picture.astype(int), axis=-1) > 20
        area = colored.sum() / (3 * frames * SIDE**2)
        assert area == pytest.approx(share, abs=0.06)


def test_a_network_that_selects_nothing_has_no_pictures(tiny_data):
    config = tiny.make_config(tiny_data, eval__settings=((16, 4, 28),))
    config.model.selector.kind = "none"
    source = open_source(f"{tiny_data}/validation.csv", tiny_data, tiny.CLASSES)
    assert KeptPatches(config, source, make_mesh(config), {}).pictures(random_params(config)) == {}


def test_a_run_has_them_at_each_validation(finished):
    values = [
        (event.step, value.tag)
        for event in events(finished.workdir / "tensorboard")
        for value in event.summary.value
    ]
    assert [step for step, tag in values if tag == "validation/kept_24"] == [8, 16, 20]
    assert [step for step, tag in values if tag == "config/text_summary"] == [0]
