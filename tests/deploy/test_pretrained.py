"""A trained network called from Python: golden numbers, budgets, videos of all kinds."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import fluxvit_jax
from fluxvit_jax.adaptive.cascade import Cascade, Step
from fluxvit_jax.checkpoints.checkpointer import find_step
from fluxvit_jax.data.clips import read_clip
from fluxvit_jax.data.decoding import Video
from fluxvit_jax.deploy.pretrained import PretrainedModel, as_patches
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation.calibration import at_temperature
from fluxvit_jax.models import fluxvit
from fluxvit_jax.token_optimization import planner
from tests.models import golden
from tests.models.test_fluxvit_golden import GOOD_CASES

CONFIG = golden.UNTOLD | {"head_budgets": [64, 32, 16]}


@pytest.fixture(scope="module")
def model(compiled):
    return fluxvit_jax.from_pretrained(golden.GOLDEN / "tiny_state.pth", CONFIG)


def video_of(name: str) -> np.ndarray:
    """The golden clip, channels last: float32 [B, T, height, width, 3], normalized."""
    return golden.arrays("tiny_cases")[f"{name}.x"].transpose(0, 2, 3, 4, 1)


def photograph(T: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (T, height, width, 3), np.uint8)


# All cases pass in tests/models; here every sixth one, since each is compiled for itself.
@pytest.mark.parametrize("case", GOOD_CASES[::6], ids=lambda c: c["id"])
def test_golden_numbers(model, case):
    arrays, head = golden.arrays("tiny_cases"), case["kwargs"]["output_head"]
    out = model(video_of(case["video"]), case["budget"], head, "official", normalized=True)
    expected = [arrays[case["outputs"][name]] for name in ("logits", "x_final")]
    np.testing.assert_allclose(out.logits, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.pooled, expected[1], rtol=1e-5, atol=1e-5)
    assert out.head == head
    if "mask" in case["outputs"]:
        dropped = arrays[case["outputs"]["mask"]]
        assert out.tokens_kept == (~dropped[0]).sum()


def test_select_keeps_the_golden_patches(model):
    case = next(c for c in GOOD_CASES if c["id"] == "c25")
    kept = model.select(video_of(case["video"]), case["budget"], "official", normalized=True)
    dropped = golden.arrays("tiny_cases")[case["outputs"]["mask"]]
    np.testing.assert_array_equal(kept.reshape(dropped.shape), ~dropped)


def test_pixels_and_normalized_values_are_the_same_clip(model):
    video = photograph(4, 28, 42)
    values = (video / 255 - fluxvit.MEAN) / fluxvit.STD
    pixels = model(video, 10)
    assert pixels.logits.shape == (1, 10) and pixels.pooled.shape == (1, 64)
    for dtype in (np.float32, np.float64):
        floats = model(values.astype(dtype), 10, normalized=True)
        np.testing.assert_allclose(pixels.logits, floats.logits, rtol=1e-4, atol=1e-4)
    kept = model.select(values, 10, normalized=True)
    np.testing.assert_array_equal(kept, model.select(video, 10))
    features = model.features(values, 10, normalized=True)
    np.testing.assert_allclose(features.pooled, pixels.pooled, rtol=1e-4, atol=1e-4)


BRIGHT = np.full((2, 28, 28, 3), 255, np.uint8)  # normalized: 2.2 to 2.6, nothing below 0


@pytest.mark.parametrize(
    ("video", "normalized", "message"),
    [
        (photograph(2, 28, 28) / 255, False, "float64 from 0 to 1: pass uint8 .* normalized=True"),
        (photograph(2, 28, 28) / 255, True, "float64 from 0 to 1, which is not .* pass uint8"),
        (np.float32(photograph(2, 28, 28)), False, "float32 from 0 to 255: pass uint8"),
        (np.float32(photograph(2, 28, 28)), True, "float32 from 0 to 255, which is not"),
        (photograph(2, 28, 28) / 127.5 - 1, False, "float64 from -1 to 1: pass uint8"),
        ((photograph(2, 28, 28) - 124.0) / 0.229, True, "from -541.5 to 572.1, which is not"),
        (np.full((2, 28, 28, 3), np.nan, np.float32), True, "from nan to nan, which is not"),
        (photograph(2, 28, 28), True, "normalized=True is for floats"),
    ],
)
def test_floats_are_never_guessed(model, video, normalized, message):
    for ask in (model, model.select, model.features):
        with pytest.raises(ValueError, match=message) as error:
            ask(video, 4, normalized=normalized)
        assert "\n" not in str(error.value)


def test_bright_frames_are_accepted_as_normalized(model):
    floats = (BRIGHT / 255 - fluxvit.MEAN) / fluxvit.STD
    out = model(floats, 4, normalized=True)
    np.testing.assert_allclose(out.logits, model(BRIGHT, 4).logits, rtol=1e-4, atol=1e-4)


def test_clips_of_a_batch_answer_as_alone(model):
    clips = np.stack([photograph(5, 28, 42, seed) for seed in range(3)])
    together = model(clips, 12)
    kept = model.select(clips, 12)
    for row, clip in enumerate(clips):
        alone = model(clip, 12)
        np.testing.assert_allclose(together.logits[row], alone.logits[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(kept[row], model.select(clip, 12)[0])


@pytest.mark.parametrize(("T", "tokens"), [(1, 4), (3, 7), (4, 9), (5, 10)])
def test_budgets_are_exact(model, T, tokens):
    out = model(photograph(T, 28, 56), tokens)
    kept = model.select(photograph(T, 28, 56), tokens)
    assert out.tokens_kept == kept.sum() == min(tokens, T * 8)
    assert kept.shape == (1, T, 2, 4)


def test_every_token_by_default(model):
    video = photograph(3, 28, 28)
    assert model.select(video).all()
    assert model(video).tokens_kept == model(video, 1000).tokens_kept == 12
    np.testing.assert_array_equal(model(video).pooled, model(video, 1000, head=2).pooled)


@pytest.mark.slow
def test_the_head_is_that_of_the_nearest_budget(model):
    video = photograph(4, 56, 56)  # 64 tokens
    assert [model(video, n).head for n in (None, 60, 33, 17, 8)] == [0, 0, 1, 2, 2]
    assert model(video, 60, head=2).head == 2


def test_odd_sizes_are_resized_not_cropped(model):
    video = np.zeros((2, 60, 92, 3), np.uint8)
    video[:, :, -6:] = 255  # the last columns, which a crop would lose
    patches, grid = as_patches(video)
    assert grid == (2, 4, 7)
    right = patches.reshape(2, 4, 7, 14, 14, 3)[:, :, -1, :, -4:]
    assert (right > 200).all()
    assert model(video, 20).tokens_kept == 20
    assert as_patches(np.zeros((1, 3, 30, 3), np.uint8))[1] == (1, 1, 2)


def test_features_are_the_kept_tokens_in_order(model):
    video = photograph(4, 42, 42)
    features, kept = model.features(video, 11), model.select(video, 11)
    assert features.tokens.shape == (1, 11, 48) and features.pooled.shape == (1, 64)
    np.testing.assert_array_equal(features.places[0], np.argwhere(kept[0]))
    np.testing.assert_allclose(features.pooled, model(video, 11).pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 28, 28), np.uint8),), "a video is"),
        ((np.zeros((2, 28, 28, 4), np.uint8),), "a video is"),
        ((np.zeros((0, 28, 28, 3), np.uint8),), "a video is"),
        ((np.zeros((2, 28, 28, 3), np.int64),), "pixels are uint8"),
        ((photograph(2, 28, 28), 0), "leaves no patch"),
        ((photograph(2, 28, 28), 4, 3), "no head 3"),
        ((photograph(2, 28, 28), 4, -1), "no head -1"),
        ((photograph(2, 28, 28), 4, 0, "down"), "rounding"),
    ],
)
def test_what_cannot_be_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(*arguments)


def test_saved_and_loaded_it_answers_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "folder")
    again = fluxvit_jax.from_pretrained(tmp_path / "folder")
    assert again.config == model.config
    video = photograph(4, 28, 42)
    np.testing.assert_array_equal(again(video, 10).logits, model(video, 10).logits)


def test_a_workdir_is_read_with_its_budgets_and_classes(finished):
    run = fluxvit_jax.from_pretrained(finished.workdir)
    assert run.config.head_budgets == (24, 12) and run.config.model.classes == 4
    assert run(photograph(6, 42, 42), 24).logits.shape == (1, 4)


def test_predictions_have_names(finished, tiny_data, tmp_path):
    """A file as --mode=predict reads it, its frames, and several at once."""
    named = {"id2label": dict(zip("0123", ("red", "green", "blue", "yellow"), strict=True))}
    model = fluxvit_jax.from_pretrained(finished.workdir, named)
    assert model.class_names == ("red", "green", "blue", "yellow")
    path = tiny_data / "20.mp4"
    with Video(path) as opened:
        frames = read_clip(opened, 4, 28).frames  # the setting of 12 tokens
    found = model.predict(path, tokens=12, top=3)
    logits = np.asarray(model(frames, 12).logits[0], np.float64)
    odds = np.exp(logits) / np.exp(logits).sum()
    expected = sorted(zip(odds, model.class_names, strict=True), reverse=True)[:3]
    assert [name for name, _ in found] == [name for _, name in expected]
    np.testing.assert_allclose([p.probability for p in found], [p for p, _ in expected], rtol=1e-6)
    assert model.predict(frames, tokens=12, top=3) == found
    assert model.predict([str(path), frames], tokens=12, top=3) == [found, found]
    clips = model.predict(np.stack([frames, frames]), tokens=12, top=9)
    assert len(clips) == 2 and len(clips[0]) == 4
    assert model.predict(str(path), top=1) == model.predict(path, tokens=24, top=1)
    unnamed = fluxvit_jax.from_pretrained(finished.workdir)
    assert unnamed.class_names == () and unnamed.predict(path)[0].name.startswith("class ")
    with pytest.raises(UserError, match=r"gone\.mp4: .*[Nn]o such file") as error:
        model.predict(tmp_path / "gone.mp4")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="top is 1 or more, not 0"):
        model.predict(path, top=0)
    assert repr(model).startswith("PretrainedModel(FluxViT-Ti, 0.")
    assert "heads trained at 24, 12 tokens, 4 classes: 'red', 'green', ...)" in repr(model)
    assert "4 classes without names)" in repr(unnamed)
    assert repr(model(frames, 12)) == (
        "Output(logits=float32[1, 4], pooled=float32[1, 64], kept=bool[1, 4, 2, 2], "
        "tokens_kept=12, head=1)"
    )


def evaluated(workdir: Path, target: Path) -> Path:
    """A copy of a workdir with three evaluations of its best step; not of the newest's classes."""
    shutil.copytree(workdir, target)
    shutil.rmtree(target / "evaluation", ignore_errors=True)
    (target / "evaluation").mkdir()
    evaluations = ("z", 4, (3.0, 4.0)), ("b", 4, (0.5, 2.0)), ("a", 9, (5.0, 6.0))
    for age, (name, classes, temperatures) in enumerate(evaluations):
        budgets = {
            str(budget): {"top1": 0.5, "top5": 1.0, "frames": 6, "resolution": 42}
            | {"calibration": {"temperature": temperature}}
            for budget, temperature in zip((24, 12), temperatures, strict=True)
        }
        report = {
            "checkpoint": f"checkpoints/{find_step(workdir).name}",
            "data": f"/home/lists/{name}.csv",
            "dataset": {"videos": 13},
            "views": "2x1",
            "class_names": [f"class {i}" for i in range(classes)],
            "budgets": budgets,
            "failures": [{"id": "/home/bad.mp4", "reason": "truncated"}],
        }
        path = target / "evaluation" / f"{name}.json"
        path.write_text(json.dumps(report))
        os.utime(path, (1e9 + age, 1e9 + age))
    return target


def test_temperatures_of_the_newest_evaluation(finished, tmp_path):
    """Of the budget nearest to the tokens; they go along into a folder, without paths and names."""
    run = fluxvit_jax.from_pretrained(evaluated(finished.workdir, tmp_path / "run"))
    assert run.temperatures == {24: 0.5, 12: 2.0} and run.calibration["data"] == "/home/lists/b.csv"
    assert [run.temperature_at(tokens) for tokens in (99, 24, 17, 16, 2)] == [0.5, 0.5, 0.5, 2, 2]
    assert planner.as_searched(run, {"dtype": "bfloat16"}).temperatures == run.temperatures
    video = photograph(4, 28, 28)
    for tokens, temperature in ((12, 2.0), (None, 2.0)):
        logits = np.asarray(run(video, tokens).logits[0], np.float64)
        probabilities = np.exp(logits) / np.exp(logits).sum()
        expected = np.sort(at_temperature(probabilities, temperature))[::-1]
        found = run.predict(video, tokens, calibrated=True)
        np.testing.assert_allclose([p.probability for p in found], expected, rtol=1e-6)
        plain = [p.probability for p in run.predict(video, tokens)]
        np.testing.assert_allclose(plain, np.sort(probabilities)[::-1], rtol=1e-6)
    run.save_pretrained(tmp_path / "folder")
    folder = fluxvit_jax.from_pretrained(tmp_path / "folder")
    assert folder.temperatures == run.temperatures and folder.calibration["data"] == "b.csv"
    assert "/home" not in (tmp_path / "folder" / "evaluations.json").read_text()
    folder.save_pretrained(tmp_path / "again")
    for name in ("README.md", "evaluations.json"):
        texts = [(tmp_path / where / name).read_text() for where in ("folder", "again")]
        assert texts[0] == texts[1], name


def test_a_bucket_is_no_place_for_a_folder(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="gs://bucket/folder: weights are written on this machine"):
        model.save_pretrained("gs://bucket/folder")
    assert not list(tmp_path.iterdir())


def test_without_temperatures(model, tmp_path):
    assert model.temperatures == {} and model.calibration is None
    with pytest.raises(UserError, match="no evaluation has calibrated these weights") as error:
        model.predict(photograph(4, 28, 28), calibrated=True)
    assert "\n" not in str(error.value)
    model.save_pretrained(tmp_path)
    (tmp_path / "evaluations.json").write_text('{"evaluations": [{"budgets": {}}]}')
    with pytest.raises(UserError, match=r"evaluations\.json: holds no evaluations"):
        fluxvit_jax.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # those of other weights are removed
    assert fluxvit_jax.from_pretrained(tmp_path).temperatures == {}


def test_cascades_that_cannot_be_run(model):
    video, network = photograph(4, 28, 28), replace(model.config.model, cls="inside")
    step = Step(budget=1, frames=4, resolution=28, head=0)
    for config, videos, error, message in (
        (replace(model.config, multi_label=True), video, UserError, "for one label a video"),
        (replace(model.config, model=network), video, UserError, "step 1: .* leaves no patch"),
        (model.config, [], ValueError, "no video is given"),
    ):
        with pytest.raises(error, match=message):
            PretrainedModel(model.params, config).run_cascade(videos, Cascade((step,)))


def test_answers_that_are_no_finite_numbers_are_refused(model):
    """NaN would be the first class, and with every threshold in doubt."""
    damaged = jax.tree.map(lambda weights: weights * np.nan, model.params)
    damaged, video = PretrainedModel(damaged, model.config), photograph(4, 28, 28)
    cascade = Cascade((Step(budget=8, frames=4, resolution=28, head=0),))
    for answer in (damaged.predict, partial(damaged.run_cascade, cascade=cascade)):
        with pytest.raises(UserError, match="answers are no finite numbers"):
            answer(video)


def test_frames_of_a_video(tiny_data, tmp_path):
    """Those that evaluation takes, at full size; more than there are come twice."""
    path = tiny_data / "24.mp4"
    frames = fluxvit_jax.read_video(path, frames=4)
    with Video(path) as opened:
        assert len(opened) == 16
        np.testing.assert_array_equal(frames, opened.read([1, 5, 9, 12]))
    assert frames.dtype == np.uint8 and frames.shape == (4, 48, 64, 3)
    assert len(fluxvit_jax.read_video(str(path), frames=20)) == 20
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    for name in ("gone.mp4", "broken.mp4"):
        with pytest.raises(UserError, match=name) as error:
            fluxvit_jax.read_video(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="frames is 1 or more"):
        fluxvit_jax.read_video(path, frames=0)


def test_bfloat16(model):
    half = fluxvit_jax.from_pretrained(golden.GOLDEN / "tiny_state.pth", CONFIG, "bfloat16")
    video = photograph(4, 28, 42)
    ours, exact = half(video).logits, model(video).logits
    assert 1e-5 < np.abs(ours - exact).max() < 0.1 * np.abs(exact).max()
