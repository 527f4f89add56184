"""A trained network called from Python: golden numbers, budgets, videos of all kinds."""

import numpy as np
import pytest

import fluxvit_jax
from fluxvit_jax.models import fluxvit
from fluxvit_jax.pretrained import as_patches
from tests.models import golden
from tests.models.test_fluxvit_golden import GOOD_CASES

CONFIG = golden.UNTOLD | {"head_budgets": [64, 32, 16]}


@pytest.fixture(scope="module")
def model(compiled):
    return fluxvit_jax.from_pretrained(golden.GOLDEN / "tiny_state.pth", CONFIG)


def video_of(name: str) -> np.ndarray:
    """The golden clip, channels last: float32 [B, T, height, width, 3], normalised."""
    return golden.arrays("tiny_cases")[f"{name}.x"].transpose(0, 2, 3, 4, 1)


def photograph(T: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (T, height, width, 3), np.uint8)


# All cases pass in tests/models; here every third one, since each is compiled for itself.
@pytest.mark.parametrize("case", GOOD_CASES[::3], ids=lambda c: c["id"])
def test_golden_numbers(model, case):
    arrays, head = golden.arrays("tiny_cases"), case["kwargs"]["output_head"]
    out = model(video_of(case["video"]), case["budget"], head, "official")
    expected = [arrays[case["outputs"][name]] for name in ("logits", "x_final")]
    np.testing.assert_allclose(out.logits, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.pooled, expected[1], rtol=1e-5, atol=1e-5)
    assert out.head == head
    if "mask" in case["outputs"]:
        dropped = arrays[case["outputs"]["mask"]]
        assert out.tokens_kept == (~dropped[0]).sum()


def test_select_keeps_the_golden_patches(model):
    case = next(c for c in GOOD_CASES if c["id"] == "c25")
    kept = model.select(video_of(case["video"]), case["budget"], "official")
    dropped = golden.arrays("tiny_cases")[case["outputs"]["mask"]]
    np.testing.assert_array_equal(kept.reshape(dropped.shape), ~dropped)


def test_pixels_and_normalised_values_are_the_same_clip(model):
    video = photograph(4, 28, 42)
    normalised = (video / 255 - fluxvit.MEAN) / fluxvit.STD
    pixels, values = model(video, 10), model(normalised.astype(np.float32), 10)
    np.testing.assert_allclose(pixels.logits, values.logits, rtol=1e-4, atol=1e-4)
    assert pixels.logits.shape == (1, 10) and pixels.pooled.shape == (1, 64)


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


def test_bfloat16(model):
    half = fluxvit_jax.from_pretrained(golden.GOLDEN / "tiny_state.pth", CONFIG, "bfloat16")
    video = photograph(4, 28, 42)
    ours, exact = half(video).logits, model(video).logits
    assert 1e-5 < np.abs(ours - exact).max() < 0.1 * np.abs(exact).max()
