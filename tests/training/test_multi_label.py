"""`train.multi_label`: a run on videos of several classes, and all that is made of it later."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from fluxvit_jax.checkpoints.checkpointer import best_step
from fluxvit_jax.deploy.pretrained import from_pretrained
from fluxvit_jax.distributed import checksums
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import report, tasks
from fluxvit_jax.token_optimization import search
from fluxvit_jax.training import train
from tests import tiny
from tests.training.test_train import split_of, unfinish

NAMES = ("blue", "green", "red")  # sorted, as labels are
# Of the tints of `tiny.write_data`: yellow is green and red.
TINTS = ("red", "green", "blue", "green | red")


def make_config(data: Path, lists: Path, **changes):
    own = {
        "data__root": str(data),
        "data__train": str(lists / "train.csv"),
        "data__validation": str(lists / "validation.csv"),
        "model__classes": 0,
        "train__multi_label": True,
        "train__label_smoothing": 0.0,
        "train__cutmix": 0.0,
        "train__epochs": 3,
        "eval__every_epochs": 1,
        "optim__learning_rate": 5e-3,
    }
    return tiny.make_config(data, **own | changes)


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> Path:
    """The lists of `tiny.write_data` with the colors of each tint; one video has no label."""
    folder = tmp_path_factory.mktemp("lists")
    rows = [f"{number}.mp4,{TINTS[number % tiny.CLASSES]}" for number in range(28)]
    rows[27] = "27.mp4,"
    (folder / "train.csv").write_text("\n".join(["path,labels", *rows[:16]]))
    (folder / "validation.csv").write_text("\n".join([*rows[16:], f"{tiny.BAD},blue|red"]))
    return folder


@pytest.fixture(scope="module")
def workdir(tiny_data, lists, compiled, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "several"
    assert train.train(make_config(tiny_data, lists), workdir) == 0
    return workdir


@pytest.mark.slow
def test_a_run_learns(workdir, tiny_data, lists, capsys):
    lines = split_of(workdir, "train")
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:3])
    assert {"bce_24", "bce_12", "align_12"} <= lines[0].keys()
    assert not [name for name in lines[0] if name.startswith(("ce_", "top1"))]
    measured = split_of(workdir, "validation")
    assert measured[0].keys() == {
        "step", "split", "map_24", "loss_24", "map_12", "loss_12", "failed",
    }  # fmt: skip
    assert max(line["map_24"] for line in measured) > 0.75
    best = max(measured, key=lambda line: (line["map_24"], line["step"]))
    assert best_step(workdir) == best["step"]

    assert train.train(make_config(tiny_data, lists), workdir) == 0
    log = capsys.readouterr().err
    share = f"mAP {best['map_24']:.2%} at 24 tokens, {best['map_12']:.2%} at 12 tokens"
    assert f"best checkpoint: step {best['step']}, {share}\n" in log
    assert "--mode=search" not in log


def test_it_resumes_as_if_never_stopped_and_knows_its_labels(workdir, tiny_data, lists, tmp_path):
    resumed = shutil.copytree(workdir, tmp_path / "resumed")
    unfinish(resumed, 10)
    with pytest.raises(UserError, match=r"train.multi_label: True -> False"):
        single = make_config(tiny_data, lists, model__classes=3, train__multi_label=False)
        train.train(single, resumed)
    other = tmp_path / "other.csv"
    other.write_text((lists / "train.csv").read_text().replace("3.mp4,green | red", "3.mp4,red"))
    with pytest.raises(UserError, match="other labels for the same videos"):
        train.train(make_config(tiny_data, lists, data__train=str(other)), resumed)
    assert train.train(make_config(tiny_data, lists), resumed) == 0
    ours, theirs = ((folder / "metrics.jsonl").read_bytes() for folder in (resumed, workdir))
    assert ours == theirs


def test_it_stops_early_by_map(workdir, tiny_data, lists, tmp_path, capsys):
    stopped = shutil.copytree(workdir, tmp_path / "stopped")
    unfinish(stopped, 10)
    lines = tiny.read_lines(stopped / "metrics.jsonl")
    falling = [line | {"map_24": 1 / line["step"]} for line in lines]
    checksums.write_lines(stopped / "metrics.jsonl", falling)
    assert train.train(make_config(tiny_data, lists, train__early_stopping_epochs=1), stopped) == 0
    line = "stopped early at step 10 of 12, because map_24 has not risen above 0.25 since step 4"
    assert line in capsys.readouterr().err


@pytest.fixture(scope="module")
def evaluated(workdir, tiny_data, lists, tmp_path_factory) -> Path:
    """A copy of the run, evaluated."""
    folder = shutil.copytree(workdir, tmp_path_factory.mktemp("evaluated") / "run")
    assert tasks.run(make_config(tiny_data, lists, model__classes=3), str(folder)) == 0
    return folder


def test_the_report_has_the_average_precision_of_each_class(evaluated, workdir):
    content, lines = tiny.read_evaluation(evaluated)
    assert [line["labels"] for line in lines[:4]] == [[2], [1], [0], [1, 2]]
    assert lines[11]["labels"] == [] and "failure" in lines[12]
    assert content["videos_of_class"] == [4, 5, 6] and content["multi_label"] is True
    step = int(content["checkpoint"].rpartition("/")[2])
    (measured,) = (line for line in split_of(workdir, "validation") if line["step"] == step)
    for budget, own in content["budgets"].items():
        scores = np.array([
            [odds for _, odds in sorted(line["predictions"][budget])] for line in lines[:12]
        ])  # fmt: skip
        assert np.ptp(scores.sum(axis=1)) > 0.1  # sigmoids, not a softmax
        for number, (precision, videos) in enumerate(
            zip(own["ap"], content["videos_of_class"], strict=True)
        ):
            is_own = [number in line["labels"] for line in lines[:12]]
            expected = average_precision_score(is_own, scores[:, number])
            # The video that cannot be read is one more that is not found.
            assert precision == pytest.approx(expected * sum(is_own) / videos)
        assert own["map"] == pytest.approx(np.mean(own["ap"])) == measured[f"map_{budget}"]
        assert own["loss"] == pytest.approx(measured[f"loss_{budget}"])


def test_the_page_has_precisions_in_place_of_the_matrix(evaluated, workdir, tiny_data, lists):
    (page,) = (evaluated / "evaluation").glob("*.html")
    content, _ = tiny.read_evaluation(evaluated)
    text = page.read_text()
    first = content["budgets"]["24"]
    assert f"{100 * first['map']:.1f} %" in text and "usion" not in text
    assert all(f"{100 * own:.1f} %" in text for own in first["ap"])
    files = {path.name.split(".", 1)[1] for path in page.parent.iterdir()}
    assert files == {"html", "json", "predictions.jsonl", "classes.csv"}
    rows = page.with_suffix(".classes.csv").read_text().splitlines()
    assert rows[0] == "class,name,videos,ap_24,ap_12"
    assert rows[3].startswith(f"2,red,6,{first['ap'][2]:.6f},")
    predictions = page.with_suffix(".predictions.jsonl")
    assert report.write(predictions) == page and page.read_text() == text
    alone = shutil.copy(predictions, page.parents[1])
    with pytest.raises(UserError, match="the report that is missing beside it"):
        report.write(alone)


def test_one_label_a_video_is_not_asked_of_it(workdir, tiny_data, lists, tmp_path):
    """Neither by another mode, nor from the weights in a folder, nor by a search."""
    saved = tmp_path / "saved"
    from_pretrained(workdir).save_pretrained(saved)
    single = make_config(tiny_data, lists, model__classes=3, train__multi_label=False)
    with pytest.raises(UserError, match=r"trained with config.train.multi_label=true, not false"):
        tasks.run(single, str(workdir))
    single.train.init_from = str(saved)
    with pytest.raises(UserError, match=r"add --config.train.multi_label=True"):
        tasks.run(single, str(tmp_path / "new"))
    with pytest.raises(UserError, match="search ranks by top-1"):
        search.run(make_config(tiny_data, lists, model__classes=3), str(workdir))


def test_probabilities_are_independent_wherever_the_weights_go(evaluated, tiny_data, tmp_path):
    model = from_pretrained(evaluated)
    model.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["problem_type"] == "multi_label_classification"
    card = (tmp_path / "README.md").read_text()
    assert "| Resolution | mAP |\n" in card and "sigmoids" in card
    frames = np.random.default_rng(0).integers(0, 256, (6, 42, 42, 3), np.uint8)
    logits = np.asarray(model(frames, 24).logits[0])
    for own in (model, from_pretrained(tmp_path)):
        predicted = own.predict(frames, 24)
        assert [name for name, _ in predicted] == [NAMES[i] for i in np.argsort(-logits)]
        np.testing.assert_allclose(
            [odds for _, odds in predicted], jax.nn.sigmoid(np.sort(logits)[::-1]), rtol=1e-5
        )
    described["problem_type"] = "regression"
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="problem_type 'regression', none of"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "field, value",
    [
        ("train.label_smoothing", 0.1),
        ("train.class_weights", "balanced"),
        ("data.sampling", "balanced"),
        ("eval.plan", "report.json"),
    ],
)
def test_fields_for_one_label_are_refused(tiny_data, lists, field, value):
    with pytest.raises(UserError, match=rf"config.{field}: {value} is for one label a video"):
        make_config(tiny_data, lists, **{field.replace(".", "__"): value})


def test_an_objective_without_labels_refuses_it(tiny_data, tmp_path):
    config = tiny.make_pretraining(tiny_data, "", train__multi_label=True)
    with pytest.raises(UserError, match="multi_label: objective flux_umt learns from no more than"):
        train.train(config, tmp_path)
