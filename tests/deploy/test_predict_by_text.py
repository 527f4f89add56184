"""`--mode=predict --classes=...`: classes that have names alone, by weights of Flux-CLIP."""

import csv

import pytest

import fluxvit_jax
from fluxvit_jax.checkpoints.weights import read_weights
from fluxvit_jax.convert import weight_files
from fluxvit_jax.deploy.predict import run
from fluxvit_jax.errors import UserError
from tests import tiny
from tests.deploy.test_predict import options

CLASSES = ("red", "green, bright", "<blue>")


@pytest.fixture(scope="module")
def clip_run(tiny_data, compiled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    config = tiny.make_clip(tiny.write_captions(tiny_data, folder), tiny_data)
    return tiny.write_clip_run(folder / "run", config)


def test_a_video_and_a_folder(clip_run, tiny_data, tmp_path, capsys):
    """Text, page, timeline and table name the classes as `classify` does."""
    video = tiny_data / "0.mp4"
    given = {"tokens": (12,), "classes": CLASSES, "top": 2}
    assert not run(options(clip_run, video, tmp_path / "one", window="0.2s", **given))
    model = fluxvit_jax.from_pretrained(clip_run)
    expected = model.classify(video, CLASSES, tokens=12, top=2)
    printed = capsys.readouterr().out
    for own in expected:
        assert f"{own.probability:7.2%}  {own.name}" in printed
    page = (tmp_path / "one/0.kept.html").read_text()
    assert "green, bright" in page and "&lt;blue&gt;" in page and "<blue>" not in page
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.mp4").write_bytes(video.read_bytes())
    assert not run(options(clip_run, tmp_path / "videos", tmp_path / "all", **given))
    with (tmp_path / "all/predictions.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    for rank, own in enumerate(expected, 1):
        assert row[f"class{rank}"].lstrip("'") == own.name
        assert float(row[f"probability{rank}"]) == pytest.approx(own.probability, abs=1e-6)


def test_what_cannot_be(clip_run, tiny_data, tmp_path):
    video, out = tiny_data / "0.mp4", tmp_path / "out"
    alone = tmp_path / "alone"
    weight_files.write(read_weights(clip_run), alone)
    for weights, given, message in (
        (alone, {"classes": CLASSES}, "--classes: .*alone has no text encoder"),
        (clip_run, {}, "has no classes of its own; name some, such as --classes"),
        (clip_run, {"classes": CLASSES, "class_names": "k400"}, "give one of them"),
        (clip_run, {"classes": ("red", "red")}, "'red' is named twice"),
        (clip_run, {"classes": CLASSES, "calibrated": True}, "leave out --classes"),
    ):
        with pytest.raises(UserError, match=message) as error:
            run(options(weights, video, out, **given))
        assert "\n" not in str(error.value)
