"""Every video counts once, with the same result for any batch size and number of devices."""

import json
import re
import shutil
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from fluxvit_jax.checkpoints.weights import read_weights, write_workdir
from fluxvit_jax.config.grids import evaluation_grids
from fluxvit_jax.config.network import model_config
from fluxvit_jax.convert import weight_files
from fluxvit_jax.data.annotations import open_source
from fluxvit_jax.data.decoding import Video
from fluxvit_jax.data.pipeline import evaluation_batches
from fluxvit_jax.data.sources import Example, FileSource
from fluxvit_jax.distributed.mesh import make_mesh
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import calibration, evaluate, tasks
from fluxvit_jax.evaluation.evaluate_mode import report_name
from fluxvit_jax.evaluation.settings import settings_of
from fluxvit_jax.evaluation.trained_weights import Weights
from fluxvit_jax.evaluation.view_programs import predictor
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.token_selection import GridLimits
from fluxvit_jax.token_optimization import search
from tests import limited, tiny
from tests.data.videos import moving_texture, write_video
from tests.test_main import error_line, outcome_here

VIDEOS = 13


def make_source(folder: Path):
    return open_source(f"{folder}/validation.csv", folder, tiny.CLASSES)


def random_params(config, seed: int = 5) -> dict:
    """Of a network that tells its classes apart: large weights in the classifier."""
    params = fluxvit.init_params(model_config(config), jax.random.key(seed))
    params["heads"]["kernel"] = params["heads"]["kernel"] * 100
    return params


def run(folder: Path, batch_size: int, **changes) -> evaluate.Evaluation:
    config = tiny.make_config(folder, eval__batch_size=batch_size, **changes)
    return evaluate.evaluate(random_params(config), config, make_source(folder))


def without_loss(evaluation: evaluate.Evaluation) -> dict:
    report = evaluation.report
    rows = report["budgets"].items()
    return report | {"budgets": {b: row | {"loss": None} for b, row in rows}}


def assert_same(one: evaluate.Evaluation, other: evaluate.Evaluation) -> None:
    assert without_loss(one) == without_loss(other)
    for budget, row in one.report["budgets"].items():
        assert row["loss"] == pytest.approx(other.report["budgets"][budget]["loss"], rel=1e-3)
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
        assert without_loss(evaluation)["budgets"][budget] == {
            "frames": frames,
            "resolution": resolution,
            "tokens": int(budget),
            "head": head,
            "top1": sum(label == top[0] for label, top in tops) / VIDEOS,
            "top5": 12 / VIDEOS,  # of four classes
            "loss": None,
            "decoded": 12,
            "failed": 1,
        }
    assert evaluation.predictions[4] == {"id": tiny.BAD, "label": 2, "failure": reason}


@pytest.mark.parametrize("batch_size", [1, 16])
def test_batch_size_changes_nothing(evaluation, tiny_data, batch_size):
    assert_same(run(tiny_data, batch_size), evaluation)


def test_selectors_that_draw_do_so_by_video(tiny_data, compiled):
    settings = {"model__selector__kind": "random", "eval__settings": ((12, 6, 42),)}
    assert_same(run(tiny_data, 3, **settings), run(tiny_data, 16, **settings))


@pytest.mark.parametrize(("kind", "same"), [("random", False), ("group_dynamic", True)])
def test_selectors_that_draw_do_so_by_view(tiny_data, compiled, tmp_path, kind, same):
    """Of a video of one frame all temporal views show the same."""
    write_video(tmp_path / "still.mp4", moving_texture(1, 48, 48, seed=0))
    (tmp_path / "still.csv").write_text("path,label\nstill.mp4,1\n")
    source = open_source(f"{tmp_path}/still.csv", tmp_path, tiny.CLASSES)
    found = []
    for clips in (1, 2):
        config = tiny.make_config(
            tiny_data, model__selector__kind=kind, eval__settings=((12, 6, 42),), eval__clips=clips
        )
        params = random_params(config)
        params["heads"]["kernel"] = params["heads"]["kernel"] / 20  # probabilities that can differ
        evaluation = evaluate.evaluate(params, config, source)
        found.append(dict(evaluation.predictions[0]["predictions"]["12"]))
    apart = max(abs(found[0][c] - found[1][c]) for c in range(tiny.CLASSES))
    assert apart < 1e-5 if same else apart > 1e-3


def test_softmax_then_mean_over_the_views(evaluation, tiny_data):
    """Against the network called plainly, a view at a time."""
    config = tiny.make_config(tiny_data, eval__batch_size=1)
    params = random_params(config)
    with evaluation_batches(config, make_source(tiny_data), evaluation_grids(config)) as batches:
        views = next(batches)["patches0"][0]  # [V, P, 588]
    model = fluxvit.from_params(fluxvit.graphdef(model_config(config)), params)
    limits, grid = GridLimits(6, 3, 3, 54), np.array([[6, 3, 3]], np.int32)

    @jax.jit
    def plainly(view):
        return jax.nn.softmax(model(fluxvit.normalize(view[None]), grid, 24, 0, limits)[0])[0]

    probabilities = [plainly(view) for view in views]
    assert len(views) == 2 and np.abs(probabilities[0] - probabilities[1]).max() > 1e-6
    mean = np.mean(probabilities, axis=0)
    top = evaluation.predictions[0]["predictions"]["24"]
    assert [c for c, _ in top] == np.argsort(-mean).tolist()
    np.testing.assert_allclose([p for _, p in top], np.sort(mean)[::-1], atol=1e-5)


def test_five_of_seven_classes_are_the_top_five(tiny_data, compiled):
    """Against the rank of the label by the network called plainly, all videos at once."""
    config = tiny.make_config(
        tiny_data, model__classes=7, eval__settings=((24, 6, 42),), eval__clips=1,
        eval__batch_size=VIDEOS,
    )  # fmt: skip
    params = random_params(config)
    params["heads"]["kernel"] = params["heads"]["kernel"] / 20  # no probability rounds to 0
    source = open_source(f"{tiny_data}/validation.csv", tiny_data, 7)
    found = evaluate.evaluate(params, config, source)
    with evaluation_batches(config, source, evaluation_grids(config)) as batches:
        batch = next(batches)
    model = fluxvit.from_params(fluxvit.graphdef(model_config(config)), params)
    grids = np.tile(np.int32([[6, 3, 3]]), (VIDEOS, 1))

    @jax.jit
    def plainly(patches):
        return model(fluxvit.normalize(patches), grids, 24, 0, GridLimits(6, 3, 3, 54))[0]

    logits = np.asarray(plainly(batch["patches0"][:, 0]))
    own = np.take_along_axis(logits, batch["label"][:, None], axis=1)
    rank = np.where(batch["failure"] == "", (logits > own).sum(axis=1), 7)
    report = found.report["budgets"]["24"]
    assert report["top1"] == (rank == 0).sum() / VIDEOS
    assert report["top5"] == (rank < 5).sum() / VIDEOS
    own = np.asarray(jax.nn.log_softmax(logits))[np.arange(VIDEOS), batch["label"]]
    assert report["loss"] == pytest.approx(-own[batch["failure"] == ""].mean(), rel=1e-4)
    assert found.scalars()["loss_24"] == report["loss"]
    assert {3, 4, 5} & set(rank.tolist()) and (rank < 5).sum() < VIDEOS - 1
    named = [len(p["predictions"]["24"]) for p in found.predictions if "predictions" in p]
    assert named == [5] * (VIDEOS - 1)


def test_one_compiled_program_a_setting(evaluation, tiny_data):
    config = tiny.make_config(tiny_data)
    mesh = make_mesh(config)
    for setting in settings_of(config):
        model = model_config(config, "cpu")
        program = predictor(model, setting, config.seed, mesh, multi_label=False)
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
        from tests.evaluation.test_evaluate import run

        assert jax.device_count() == {devices}
        print(json.dumps(run(Path({str(tiny_data)!r}), 3)))
        """
    )
    environment = tiny.environment(compiled, devices)
    done = limited.run([sys.executable, "-c", program], env=environment)
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
    assert tasks.run(config, str(finished.workdir)) == 0
    printed = capsys.readouterr().out
    report, lines = tiny.read_evaluation(finished.workdir)
    assert report["data"] == config.data.validation and report["plan"] is None
    assert (report["selector"], report["dtype"]) == (config.model.selector.to_dict(), "float32")
    assert {b: own["head"] for b, own in report["budgets"].items()} == {"24": 0, "17": 0, "4": 1}
    assert report["checkpoint"].startswith("checkpoints/")
    assert f"{report['budgets']['24']['top1']:.2%}" in printed
    assert report["class_names"] == [f"class {i}" for i in range(tiny.CLASSES)]
    (written,) = (line for line in printed.splitlines() if line.startswith("written to "))
    page = finished.workdir / "evaluation" / written.split(" and ")[1]
    assert f"Evaluation of {report['checkpoint']}" in page.read_text()
    warning = (
        "1 of 13 videos could not be read and count as wrong; bad.mp4: "
        f"{report['failures'][0]['reason']}; that is more than data.max_bad_fraction=0.05"
    )
    assert printed.splitlines()[-1] == f"warning: {warning}" and report["warning"] == warning
    assert printed.count("could not be read") == 1
    assert len(lines) == VIDEOS and len(lines[0]["predictions"]["4"]) == tiny.CLASSES
    header, *rows, _ = printed.splitlines()[: len(report["budgets"]) + 2]
    assert header.split()[-1] == "ECE"
    for budget, row in zip(report["budgets"], rows, strict=True):
        found = assert_calibrated(report["budgets"][budget], lines, budget)
        assert row.split()[-1] == f"{found['ece']:.2%}"
    validation = [
        line
        for line in tiny.read_lines(finished.workdir / "metrics.jsonl")
        if f"checkpoints/{line['step']}" == report["checkpoint"] and "top1_24" in line
    ]
    (line,) = [line for line in validation if line["split"] == "validation"]
    assert line["top1_24"] == report["budgets"]["24"]["top1"]


def assert_calibrated(row: dict, lines: list[dict], budget: str) -> dict:
    """That the calibration of a budget is that of its predictions, which name all classes."""
    tops = [(line["label"], line["predictions"][budget]) for line in lines if "failure" not in line]
    probabilities = np.array([[p for _, p in sorted(top)] for _, top in tops])
    expected = calibration.measure(probabilities, np.array([label for label, _ in tops]))
    found = row["calibration"]
    assert sum(found["bins"]["count"]) == row["decoded"] == len(tops)
    for name in ("ece", "temperature", "ece_at_temperature"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    return found


def test_weights_without_a_run_are_evaluated(finished, tiny_data, tmp_path, capsys):
    source = finished.workdir / "checkpoints" / "20"
    config = tiny.make_config(tiny_data, train__init_from=str(source))
    assert tasks.run(config, str(tmp_path)) == 0
    assert tiny.read_evaluation(tmp_path)[0]["checkpoint"] == str(source)


def test_what_makes_another_network_of_the_weights_is_refused(finished, tiny_data):
    for change in ({"model__gelu": "erf"}, {"train__budgets": (24, 8)}):
        config = tiny.make_config(tiny_data, **change)
        (name,) = change
        with pytest.raises(UserError, match=f"was trained with config.{name.replace('__', '.')}="):
            tasks.run(config, str(finished.workdir))
    with pytest.raises(UserError, match=r"no data to evaluate on"):
        tasks.run(tiny.make_config(tiny_data, data__validation=""), str(finished.workdir))


def test_lists_of_other_classes_than_the_weights_are_refused(finished, tiny_data, tmp_path):
    """As many classes with other names; the names come with the weights, or from a file."""
    workdir = tmp_path / "named"
    named = read_weights(finished.workdir, {"id2label": dict(zip("0123", "abcd", strict=True))})
    write_workdir(named, workdir)
    assert (workdir / "classes.txt").read_text() == "a\nb\nc\nd\n"
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    folders = {
        "data__validation": tiny.class_folders(tiny_data, tmp_path / "v", "wabc", range(16, 28)),
        "data__class_names": str(tmp_path / "names.txt"),
    }
    config = tiny.make_config(tiny_data, **folders)
    for source, reference in ((workdir, "checkpoints/0"), (finished.workdir, "data.class_names")):
        refusal = rf"validation=.*: class 3 is 'w', but .*{reference} calls it 'd'"
        for mode in (tasks, search):
            with pytest.raises(UserError, match=refusal):
                mode.run(config, str(source))


def test_a_list_of_names_needs_names_of_the_classes(finished, tiny_data, tmp_path):
    (tmp_path / "list.csv").write_text("16.mp4,a\n17.mp4,b\n18.mp4,c\n19.mp4,d\n")
    lists = {"data__validation": str(tmp_path / "list.csv"), "data__root": str(tiny_data)}
    with pytest.raises(
        UserError, match=r"its labels are names, but checkpoints/\d+ has numbers only"
    ):
        tasks.run(tiny.make_config(tiny_data, **lists), str(finished.workdir))


def test_few_failures_are_said_without_a_warning(finished, tiny_data, capsys):
    config = tiny.make_config(tiny_data, data__max_bad_fraction=0.1)
    assert tasks.run(config, str(finished.workdir)) == 0
    *_, failures, written = capsys.readouterr().out.splitlines()
    assert failures.startswith("1 of 13 videos could not be read and count as wrong; bad.mp4: ")
    assert "max_bad_fraction" not in failures and written.startswith("written to ")
    assert tiny.read_evaluation(finished.workdir)[0]["warning"] is None


def test_where_nothing_can_be_read_there_is_no_report(finished, tiny_data, tmp_path, capsys):
    """A wrong root: neither an accuracy of 0 % nor a status of 0."""
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    shutil.rmtree(workdir / "evaluation", ignore_errors=True)
    (tmp_path / "wrong").mkdir()
    flags = ["--mode=evaluate", f"--config.data.root={tmp_path / 'wrong'}"]
    status, out, err = outcome_here(capsys, tiny_data, workdir, *flags)
    assert status == 2 and not out
    assert error_line(err) == (
        f"error: {tiny_data}/validation.csv: not one of 13 videos can be read; 16.mp4: "
        f"no such file; they were looked for in {tmp_path}/wrong, see config.data.root"
    )
    assert not (workdir / "evaluation").exists()


def test_no_accuracy_where_nothing_can_be_read(tiny_data):
    config = tiny.make_config(tiny_data)
    source = FileSource([Example(tiny.BAD, 2, str(tiny_data / tiny.BAD))])
    with pytest.raises(UserError, match=r"not one of 1 videos can be read; bad.mp4: cannot open"):
        evaluate.evaluate(random_params(config), config, source)


def spoiled(finished, tmp_path) -> Path:
    """The best weights of a run, with a NaN in one bias."""
    found = read_weights(finished.workdir)
    bias = found.state["blocks.0.mlp.fc1.bias"].copy()
    bias[0] = np.nan
    state = found.state | {"blocks.0.mlp.fc1.bias": bias}
    weight_files.write(found._replace(state=state), tmp_path / "nan.safetensors")
    return tmp_path / "nan.safetensors"


def test_weights_without_finite_numbers_have_no_report(finished, tiny_data, tmp_path, capsys):
    """Not the share of class 0 as their accuracy, and a status of 0."""
    weights = spoiled(finished, tmp_path)
    options = ["--mode=evaluate", f"--config.train.init_from={weights}"]
    status, out, err = outcome_here(capsys, tiny_data, tmp_path / "run", *options)
    assert status == 2 and not out
    assert error_line(err).startswith(
        f"error: {weights}: these weights give no finite numbers at budget 24, so nothing"
    )
    assert not (tmp_path / "run" / "evaluation").exists()
    config = tiny.make_config(tiny_data, search__split=str(tiny_data / "train.csv"), data__train="")
    config.train.init_from = str(weights)
    with pytest.raises(
        UserError, match=r"no finite numbers in cell \w+-\d+-\d+x\d+-h\d, so nothing"
    ):
        search.run(config, str(tmp_path / "run"))
    assert '"found"' not in (tmp_path / "run" / "search" / "cells.jsonl").read_text()


@pytest.mark.parametrize("several", [False, True])
def test_probabilities_that_are_no_numbers_find_nothing(tiny_data, compiled, several):
    """On the way of a run, which goes on: what to do about its weights, its loss tells."""
    config = tiny.make_config(
        tiny_data, eval__settings=((12, 4, 28),), train__label_smoothing=0.0,
        train__multi_label=several,
    )  # fmt: skip
    params = random_params(config)
    params["heads"]["bias"] = np.full_like(params["heads"]["bias"], np.nan)
    source = make_source(tiny_data)
    if several:
        source = FileSource([e._replace(label=(e.label,)) for e in source.examples])
    found = evaluate.evaluate(params, config, source)
    scalars = found.scalars()
    assert np.isnan(scalars["loss_12"])
    if not several:
        assert scalars["top1_12"] == scalars["top5_12"] == 0
        return
    # As where all scores are equal: 3 of the 12 that can be read, and class 2 lacks one of its 4.
    assert found.report["budgets"]["12"]["ap"] == pytest.approx([0.25, 0.25, 0.1875, 0.25])


@pytest.mark.slow
def test_reports_replace_only_themselves(finished, tiny_data, tmp_path):
    """Of other data of the same name, other views or settings, and other weights."""
    lines = (tiny_data / "validation.csv").read_text().splitlines()
    for folder, videos in (("a", lines[:3]), ("b", lines[:4])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "validation.csv").write_text("\n".join(videos) + "\n")
    workdir, best = tmp_path / "run", str(finished.workdir / "checkpoints" / "20")

    def reports(folder: str, **changes) -> dict[str, bytes]:
        """The files after an evaluation, by their names."""
        config = tiny.make_config(
            tiny_data,
            **{"data__validation": str(tmp_path / folder / "validation.csv")},
            **{"data__root": str(tiny_data), "train__init_from": best} | changes,
        )
        assert tasks.run(config, str(workdir)) == 0
        return {path.name: path.read_bytes() for path in (workdir / "evaluation").iterdir()}

    first = reports("a")
    (name,) = {name.split(".")[0] for name in first}
    assert re.fullmatch(r"a-validation-\w{8}", name)
    endings = ["json", "predictions.jsonl", "html", "classes.csv", "confusion.csv", "confusion.png"]
    assert first.keys() == {f"{name}.{ending}" for ending in endings}
    assert reports("a") == first
    before = first
    for other in (
        {"folder": "b"},
        {"folder": "a", "eval__clips": 1},
        {"folder": "a", "eval__settings": ((24, 6, 42),)},
        {"folder": "a", "model__selector__kind": "dynamic_l2"},
        {"folder": "a", "train__init_from": str(finished.workdir / "checkpoints" / "18")},
    ):
        after = reports(**other)
        assert len(after) == len(before) + 6 and after.items() >= before.items(), other
        before = after
    with (tmp_path / "b" / "validation.csv").open("a") as file:
        file.write(lines[4] + "\n")  # another list under the same name
    after = reports("b")
    assert len(after) == len(before) + 6 and after.items() >= before.items()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("lists/val.csv", "lists-val-"),
        ("somewhere/k400:test", "somewhere-k400-test-"),
        ("/", ""),
        ("x/" + "long " * 60, "long-" * 8),
    ],
)
def test_names_of_reports(tiny_data, tmp_path, monkeypatch, data, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "val.csv").touch()
    config, source = tiny.make_config(tiny_data), make_source(tiny_data)
    config.data.validation = data
    weights = Weights({}, "checkpoints/20", {})
    name = report_name(config, source, settings_of(config), weights)
    assert re.fullmatch(rf"{words}[0-9a-f]{{8}}", name), name
