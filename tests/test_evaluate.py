"""Every video counts once, with the same result for any batch size and number of devices."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from fluxvit_jax import evaluate, parallel
from fluxvit_jax.config import evaluation_grids, model_config
from fluxvit_jax.data.annotations import open_source
from fluxvit_jax.data.decode import Video
from fluxvit_jax.data.pipeline import evaluation_batches
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.selection import GridLimits
from tests import tiny

VIDEOS = 13


def make_source(folder: Path):
    return open_source(f"{folder}/validation.csv", folder, tiny.CLASSES)


def random_params(config, seed: int = 5) -> dict:
    """Of a network that tells its classes apart: large weights in the classifier."""
    params = fluxvit.initialise(model_config(config), jax.random.key(seed))
    params["heads"]["kernel"] = params["heads"]["kernel"] * 100
    return params


def run(folder: Path, batch_size: int, **changes) -> evaluate.Evaluation:
    config = tiny.make_config(folder, eval__batch_size=batch_size, **changes)
    return evaluate.evaluate(random_params(config), config, make_source(folder))


def assert_same(one: evaluate.Evaluation, other: evaluate.Evaluation) -> None:
    assert one.report == other.report
    for own, their in zip(one.predictions, other.predictions, strict=True):
        assert (own["id"], own["label"]) == (their["id"], their["label"])
        assert own.get("failure") == their.get("failure")
        for budget, top in own.get("predictions", {}).items():
            # Each shape is summed in an order of its own, and the classifier's weights are large.
            np.testing.assert_allclose(top, their["predictions"][budget], atol=1e-4)


@pytest.fixture(scope="module")
def evaluation(tiny_data, compiled) -> evaluate.Evaluation:
    return run(tiny_data, 4)


def test_every_video_counts_and_a_bad_one_as_wrong(evaluation, tiny_data):
    report = evaluation.report
    source = make_source(tiny_data)
    assert report["dataset"] == {"videos": VIDEOS, "fingerprint": source.fingerprint}
    assert report["views"] == "2x1"
    ((bad, reason),) = [failure.values() for failure in report["failures"]]
    assert bad == tiny.BAD and reason and "\n" not in reason
    assert [p["id"] for p in evaluation.predictions] == [source[i].id for i in range(VIDEOS)]
    for budget, frames, resolution, head in (("24", 6, 42, 0), ("12", 4, 28, 1)):
        tops = [
            (p["label"], [c for c, _ in p["predictions"][budget]])
            for p in evaluation.predictions
            if p["id"] != tiny.BAD
        ]
        assert report["budgets"][budget] == {
            "frames": frames,
            "resolution": resolution,
            "tokens": int(budget),
            "head": head,
            "top1": sum(label == top[0] for label, top in tops) / VIDEOS,
            "top5": 12 / VIDEOS,  # of four classes
            "decoded": 12,
            "failed": 1,
        }
    assert evaluation.predictions[4] == {"id": tiny.BAD, "label": 2, "failure": reason}


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_batch_size_changes_nothing(evaluation, tiny_data, batch_size):
    assert_same(run(tiny_data, batch_size), evaluation)


def test_selectors_that_draw_do_so_by_video(tiny_data, compiled):
    settings = {"model__selector__kind": "random", "eval__settings": ((12, 6, 42),)}
    assert_same(run(tiny_data, 3, **settings), run(tiny_data, 16, **settings))


def test_softmax_then_mean_over_the_views(evaluation, tiny_data):
    """Against the network called plainly, a view at a time."""
    config = tiny.make_config(tiny_data, eval__batch_size=1)
    params = random_params(config)
    with evaluation_batches(config, make_source(tiny_data), evaluation_grids(config)) as batches:
        views = next(batches)["patches0"][0]  # [V, P, 588]
    model = fluxvit.merge(fluxvit.structure(model_config(config)), params)
    limits, grid = GridLimits(6, 3, 3, 54), np.array([[6, 3, 3]], np.int32)
    probabilities = [
        jax.nn.softmax(model(fluxvit.normalise(v[None]), grid, 24, 0, limits)[0])[0] for v in views
    ]
    assert len(views) == 2 and np.abs(probabilities[0] - probabilities[1]).max() > 1e-6
    mean = np.mean(probabilities, axis=0)
    top = evaluation.predictions[0]["predictions"]["24"]
    assert [c for c, _ in top] == np.argsort(-mean).tolist()
    np.testing.assert_allclose([p for _, p in top], np.sort(mean)[::-1], atol=1e-5)


def test_one_compiled_program_a_setting(evaluation, tiny_data):
    config = tiny.make_config(tiny_data)
    mesh = parallel.make_mesh(config)
    for setting in evaluate.settings_of(config):
        program = evaluate.predictor(model_config(config, "cpu"), setting, config.seed, mesh)
        before = program._cache_size()
        run(tiny_data, 4)
        run(tiny_data, 4)
        assert program._cache_size() == before > 0


@pytest.mark.parametrize("devices", [4])
def test_devices_change_nothing(evaluation, tiny_data, compiled, devices):
    program = textwrap.dedent(
        f"""
        import json
        import jax
        from pathlib import Path
        from tests.test_evaluate import run

        assert jax.device_count() == {devices}
        print(json.dumps(run(Path({str(tiny_data)!r}), 3)))
        """
    )
    environment = tiny.environment(compiled, devices)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_same(evaluate.Evaluation(*json.loads(done.stdout)), evaluation)


def test_a_video_is_decoded_once(tiny_data, monkeypatch):
    """All settings and views of one opening of the file."""
    opened = []
    real = Video.__init__

    def count(self, path, *rest):
        opened.append(Path(path).name)
        real(self, path, *rest)

    monkeypatch.setattr(Video, "__init__", count)
    run(tiny_data, 4)
    assert len(opened) == len(set(opened)) == VIDEOS


def test_a_stopped_evaluation_says_nothing(evaluation, tiny_data):
    config = tiny.make_config(tiny_data)
    asked = iter([False, True])
    found = evaluate.evaluate(
        random_params(config), config, make_source(tiny_data), stop=lambda: next(asked)
    )
    assert found is None


def test_a_workdir_is_evaluated(finished, tiny_data, capsys):
    """The best checkpoint, at budgets other than the trained ones too."""
    config = tiny.make_config(tiny_data, eval__settings=((24, 6, 42), (17, 6, 42), (4, 4, 28)))
    assert evaluate.run(config, str(finished.workdir)) == 0
    printed = capsys.readouterr().out
    folder = finished.workdir / "evaluation"
    report = json.loads((folder / "validation.json").read_text())
    assert {b: own["head"] for b, own in report["budgets"].items()} == {"24": 0, "17": 0, "4": 1}
    assert report["checkpoint"].startswith("checkpoints/")
    assert f"{report['budgets']['24']['top1']:.2%}" in printed
    assert "1 videos could not be read and count as wrong; bad.mp4: " in printed
    lines = tiny.read_lines(folder / "predictions.jsonl")
    assert len(lines) == VIDEOS and len(lines[0]["predictions"]["4"]) == tiny.CLASSES
    validation = [
        line
        for line in tiny.read_lines(finished.workdir / "metrics.jsonl")
        if f"checkpoints/{line['step']}" == report["checkpoint"] and "top1_24" in line
    ]
    (line,) = [line for line in validation if line["split"] == "validation"]
    assert line["top1_24"] == report["budgets"]["24"]["top1"]


def test_weights_without_a_run_are_evaluated(finished, tiny_data, tmp_path, capsys):
    source = finished.workdir / "checkpoints" / "20"
    config = tiny.make_config(tiny_data, train__init_from=str(source))
    assert evaluate.run(config, str(tmp_path)) == 0
    assert json.loads((tmp_path / "evaluation/validation.json").read_text())["checkpoint"] == str(
        source
    )


def test_what_makes_another_network_of_the_weights_is_refused(finished, tiny_data):
    for change in ({"model__gelu": "erf"}, {"train__budgets": (24, 8)}):
        config = tiny.make_config(tiny_data, **change)
        (name,) = change
        with pytest.raises(UserError, match=f"was trained with config.{name.replace('__', '.')}="):
            evaluate.run(config, str(finished.workdir))
    with pytest.raises(UserError, match=r"no data to evaluate on"):
        evaluate.run(tiny.make_config(tiny_data, data__validation=""), str(finished.workdir))


def test_names_of_reports():
    assert evaluate.name_of(__file__) == "test_evaluate"
    assert evaluate.name_of("somewhere/k400:test") == "k400-test"
