"""Evaluations that go along with the weights of a workdir."""

import shutil

import pytest

from fluxvit_jax.checkpoints.weights import read_weights
from fluxvit_jax.deploy.pretrained import PretrainedModel
from fluxvit_jax.evaluation import tasks
from tests import tiny


@pytest.fixture
def workdir(finished, tiny_data, tmp_path):
    """That of a run, evaluated with its own selector, and then with another for comparison."""
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    shutil.rmtree(workdir / "evaluation", ignore_errors=True)
    for kind in ("group_dynamic", "random"):
        config = tiny.make_config(tiny_data, model__selector__kind=kind)
        assert tasks.run(config, str(workdir)) == 0
    return workdir


def test_evaluations_of_another_selector_are_not_of_the_weights(workdir):
    """Neither their accuracies in the model card nor their temperatures."""
    assert len(list((workdir / "evaluation").glob("*.json"))) == 2
    found = read_weights(workdir)
    (evaluation,) = found.evaluations
    assert evaluation["selector"]["kind"] == "group_dynamic"
    model = PretrainedModel(found.params(), found.config, found.evaluations)
    assert model.calibration == evaluation
    for changed in ({"groups": 2}, {"selector": "tube"}, {"rounding": "official"}):
        assert read_weights(workdir, changed).evaluations == ()
    assert len(read_weights(workdir, {"id2label": {}}).evaluations) == 1
