"""Reports of Flux-CLIP: one for each weights, and none of weights that give no finite numbers."""

import json

import numpy as np
import pytest

from fluxvit_jax.checkpoints.checkpointer import Checkpoints, restore
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import retrieve, tasks
from fluxvit_jax.objectives.flux_clip import HEAD, TEXT
from tests import tiny

OPTIONS = ["A red, number 1", "A green, number 1"]


@pytest.fixture(scope="module")
def runs(tiny_data, compiled, tmp_path_factory):
    """The config of two runs of Flux-CLIP with random weights, and their workdirs. Read only."""
    folder = tmp_path_factory.mktemp("clip")
    captions = tiny.write_captions(tiny_data, folder)
    config = tiny.make_clip(captions, tiny_data, eval__settings=((12, 4, 28),))
    return config, [tiny.write_clip_run(folder / f"run{seed}", config, seed) for seed in (0, 1)]


@pytest.fixture(params=["retrieval", "multiple_choice", "zero_shot"])
def asked(request, runs, tiny_data, tmp_path):
    """The config of an evaluation of each kind, of few videos."""
    config = runs[0].copy_and_resolve_references()
    config.eval.task = request.param
    path = tmp_path / "list.json"
    match request.param:
        case "retrieval":
            entries = [{"video": f"{n}.mp4", "caption": f"number {n}"} for n in range(3)]
        case "multiple_choice":
            entries = [{"video": f"{n}.mp4", "option": OPTIONS, "answer": n} for n in range(2)]
        case "zero_shot":
            path = tmp_path / "list.csv"
            path.write_text("0.mp4,0\n1.mp4,1\n")
            (tmp_path / "names.txt").write_text("red\ngreen\n")
            (tmp_path / "prompts.txt").write_text("{}\n")
            config.data.class_names = str(tmp_path / "names.txt")
            config.eval.prompts = str(tmp_path / "prompts.txt")
    if path.suffix == ".json":
        path.write_text(json.dumps(entries))
    config.data.validation = str(path)
    return config


def reports_in(workdir) -> dict[str, dict]:
    paths = (workdir / "evaluation").glob("*.json")
    return {path.name: json.loads(path.read_text()) for path in paths}


def test_each_weights_have_a_report(asked, runs, tmp_path):
    """Of the same videos, in one workdir; the same ones again replace their own."""
    for workdir in (*runs[1], runs[1][0]):
        asked.train.init_from = str(workdir)
        assert tasks.run(asked, str(tmp_path / "out")) == 0
    reports = reports_in(tmp_path / "out").values()
    assert {report["checkpoint"] for report in reports} == {str(own) for own in runs[1]}
    assert len(reports) == 2
    for report in reports:
        assert report["selector"] == asked.model.selector.to_dict()
        assert report["dtype"] == "float32"


def test_what_changes_the_answers_changes_the_name(runs):
    config = runs[0].copy_and_resolve_references()
    config.data.validation = "pairs.json"
    report = {"budgets": {}, "pairs": "", "views": "", "paragraphs": False, "dual_temperature": 1.0}
    names = {retrieve.report_name(config, report, "")}
    names.add(retrieve.report_name(config, report, "another/run"))
    for section, field, value in (
        (config.model, "dtype", "bfloat16"),
        (config, "seed", 7),
        (config.model.selector, "kind", "tube"),
    ):
        section[field] = value
        names.add(retrieve.report_name(config, report, ""))
    assert len(names) == 5


@pytest.mark.parametrize("spoiled", [HEAD, TEXT])
def test_weights_without_finite_numbers_have_no_report(
    asked, runs, tiny_data, tmp_path, spoiled, capsys
):
    """A NaN in one bias, which was "top-1 12.50%" and a recall of 100 %."""
    workdir = tmp_path / "run"
    params = dict(restore(runs[1][0]).params)
    part = params[spoiled]
    while "bias" not in part:
        part = next(own for own in part.values() if isinstance(own, dict))
    part["bias"] = np.full_like(part["bias"], np.nan)
    workdir.mkdir()
    with Checkpoints(workdir, keep=1, every=1) as checkpoints:
        about = {"class_names": [], "frozen": {}}
        checkpoints.save(0, {"params": params, "step": np.int32(0)}, about, runs[0])
    with pytest.raises(
        UserError, match=r"checkpoints/0: these weights give no finite numbers"
    ) as e:
        tasks.run(asked, str(workdir))
    assert "\n" not in str(e.value)
    assert not (workdir / "evaluation").exists() and "%" not in capsys.readouterr().out
